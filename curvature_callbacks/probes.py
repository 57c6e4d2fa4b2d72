"""Probes: microbatches drawn from the training data without moving anything the training loop draws from."""

import copy
import hashlib
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final, Literal, final

import torch
from torch.utils.data import DataLoader, IterableDataset

from curvature_callbacks.batches import batch_size, detached_copy, take_rows
from curvature_callbacks.distributed import current_world
from curvature_callbacks.errors import ConfigurationError

Draw = Literal["fresh", "fixed"]
Prepare = Callable[[Any], Any]

_SEARCH_OBJECTS: Final = 5000  # objects looked at for generators of a dataset's or collator's own
_LEAVES: Final = (torch.Tensor, str, bytes, int, float, type, ModuleType, type(None))
_SEARCH_WIDTH: Final = 64  # containers with more entries hold data, not generators


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from SHA-1 of the parts, equal in every process (`hash()` is salted)."""
    digest = hashlib.sha1(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Probes(ABC):
    """A source of microbatches. Call `draw` inside `isolated(model)`: it may use the global generators."""

    @abstractmethod
    def draw(self, seed: int) -> Sequence[Any] | None:
        """The microbatches that belong to `seed`, or None while there is no data yet."""


@final
class DatasetProbes(Probes):
    """Rows of a map-style dataset, indexed directly and collated by a copy of the loader's collator.

    The loader itself is never iterated: that moves the global generator and, with persistent workers or streams, the order
    of the training data. Generators and attributes of dataset and collator are put back as they were.

    Args:
        dataset: map-style, with `__len__`.
        collate: list of rows to a batch.
        num_microbatches: microbatches a probe.
        microbatch_size: rows of each; fewer when the dataset is smaller.
        prepare: what the loop does to a collated batch before the model sees it (transfer hooks, augmentation).
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        *,
        num_microbatches: int,
        microbatch_size: int,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        self._dataset = dataset
        self._prepare = prepare or (lambda batch: batch)
        self._collate = collate
        self._num_microbatches = num_microbatches
        self._microbatch_size = microbatch_size

    def draw(self, seed: int) -> list[Any]:
        """Rows without replacement, from a private generator; every process of a run has rows of its own."""
        length, world = len(self._dataset), current_world()
        drawn = min(self._num_microbatches * self._microbatch_size * world.size, length)
        indices = random.Random(seed).sample(range(length), drawn)[world.rank :: world.size]
        count = len(indices)
        collate = _private_copy(self._collate)
        with undisturbed(self._dataset, self._collate):
            return [
                self._prepare(collate(self._rows(indices[start : start + self._microbatch_size])))
                for start in range(0, count, self._microbatch_size)
            ]

    def _rows(self, indices: list[int]) -> list[Any]:
        if getattr(self._dataset, "__getitems__", None):
            return list(self._dataset.__getitems__(indices))
        return [self._dataset[index] for index in indices]


@final
class FixedProbes(Probes):
    """The same microbatches at every probe."""

    def __init__(self, microbatches: Sequence[Any]) -> None:
        self._microbatches = list(microbatches)

    def draw(self, seed: int) -> list[Any]:
        """All of them, whatever the seed."""
        return self._microbatches


@final
class CapturedProbes(Probes):
    """Copies of the latest training batches, for data that cannot be indexed: streams and combined loaders.

    Args:
        num_microbatches: microbatches a probe, at most.
        microbatch_size: rows of each, at most.
        prepare: what is done to a batch before it is kept.
    """

    def __init__(self, *, num_microbatches: int, microbatch_size: int, prepare: Prepare | None = None) -> None:
        self._recent: deque[Any] = deque(maxlen=num_microbatches)
        self._microbatch_size = microbatch_size
        self._prepare = prepare or (lambda batch: batch)

    def offer(self, batch: Any) -> None:
        """Keep a copy of the first rows of a training batch. Cost: that copy."""
        rows = torch.arange(min(batch_size(batch), self._microbatch_size))
        self._recent.append(detached_copy(self._prepare(take_rows(batch, rows))))

    def draw(self, seed: int) -> list[Any] | None:
        """Those kept, oldest first; None before the first batch."""
        return list(self._recent) or None


def probes_from_loader(
    loader: Any, *, num_microbatches: int, microbatch_size: int, prepare: Callable[[Any], Any] | None = None
) -> DatasetProbes | None:
    """Probes on the loader's dataset, or None when it cannot be indexed (a stream, a combined loader, no collation)."""
    dataset: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    indexable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not indexable or isinstance(dataset, IterableDataset) or collate is None:
        return None
    if isinstance(loader, DataLoader) and loader.batch_size is None and loader.batch_sampler is None:
        return None
    return dataset_probes(dataset, collate, num_microbatches=num_microbatches, microbatch_size=microbatch_size, prepare=prepare)


def dataset_probes(dataset: Any, collate: Callable[[list[Any]], Any], **options: Any) -> DatasetProbes:
    """Probes on a map-style dataset.

    Args:
        dataset: it.
        collate: list of rows to a batch.
        options: of `DatasetProbes`.

    Raises:
        ConfigurationError: it cannot be indexed, or has no rows.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or isinstance(dataset, IterableDataset):
        raise ConfigurationError(
            f"`probe_dataset` must have `__getitem__` and `__len__`, so that rows can be drawn, got {type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise ConfigurationError("the dataset is empty: there is nothing to draw a probe from.")
    return DatasetProbes(dataset, collate, **options)


def as_probes(probes: Any, *, num_microbatches: int, microbatch_size: int) -> Probes:
    """`probes` itself, fixed ones from a list of microbatches, or rows of a loader's dataset.

    Raises:
        ConfigurationError: none of these.
    """
    if isinstance(probes, Probes):
        return probes
    if isinstance(probes, list | tuple):
        return FixedProbes(probes)
    found = probes_from_loader(probes, num_microbatches=num_microbatches, microbatch_size=microbatch_size)
    if found is None:
        raise ConfigurationError(
            "`probes` must be a DataLoader over a map-style dataset, a list of microbatches or a Probes object, got "
            f"{type(probes).__name__}. For streams use CapturedProbes and offer it the training batches."
        )
    return found


def _private_copy(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """A copy whose counters and caches are its own, or the collator itself where it is a method (of a whole module, say) or
    holds locks or files: generators and attributes are put back in either case."""
    if isinstance(collate, MethodType):
        return collate
    try:
        return copy.deepcopy(collate)
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError):
        return collate


class undisturbed:  # noqa: N801 - reads as a verb in `with`
    """Puts generators and attributes of everything that can be reached from the given objects back as they were.

    A data set may open its file at the first access, count or cache: what a probe opened in this process must not be
    inherited by workers forked later, which would then share one file offset.
    """

    def __init__(self, *owners: Any) -> None:
        self._objects = list(reachable(owners))

    def __enter__(self) -> None:
        generators = [value for value in self._objects if _is_generator(value)]
        self._states = [(generator, copy.deepcopy(_get_state(generator))) for generator in generators]
        self._attributes = [(found, dict(found)) for value in self._objects if (found := _attributes(value)) is not None]

    def __exit__(self, *_: object) -> None:
        for generator, state in self._states:
            _set_state(generator, state)
        for found, saved in self._attributes:
            if found.keys() != saved.keys() or any(found[name] is not value for name, value in saved.items()):
                found.clear()
                found.update(saved)


def reachable(owners: tuple[Any, ...]) -> Iterator[Any]:
    """Objects reachable through attributes, closures and small containers, never through user-defined attribute access."""
    waiting, seen = deque(owners), set[int]()
    while waiting and len(seen) < _SEARCH_OBJECTS:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen.add(id(value))
        yield value
        if not _is_generator(value):
            waiting.extend(_children(value))


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= _SEARCH_WIDTH else []
    if isinstance(value, list | tuple | set):
        return list(value) if len(value) <= _SEARCH_WIDTH else []
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return [*(_attributes(value) or {}).values(), *_slots(value)]


def _attributes(value: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


def _slots(value: Any) -> list[Any]:
    found = []
    for kind in type(value).__mro__:
        for name in vars(kind).get("__slots__", ()):
            with suppress(AttributeError):  # declared and not set
                found.append(object.__getattribute__(value, name))
    return found


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _is_generator(value: Any) -> bool:
    return isinstance(value, torch.Generator | random.Random) or _is_numpy_generator(value)


def _is_numpy_generator(value: Any) -> bool:
    kind = type(value)
    return kind.__module__.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState")


def _get_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator) or type(generator).__name__ == "RandomState":
        return generator.get_state()
    return generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, torch.Generator) or type(generator).__name__ == "RandomState":
        generator.set_state(state)
    else:
        generator.bit_generator.state = state
