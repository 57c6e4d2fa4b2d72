"""Probes: microbatches drawn from the training data without moving anything the training loop draws from."""

import copy
import hashlib
import logging
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from types import MethodType
from typing import Any, Literal, final

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from curvature_callbacks.batches import batch_size, detached_copy, take_rows
from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.isolation.snapshot import undisturbed
from curvature_callbacks.library_internals.frameworks import sampler_behind
from curvature_callbacks.processes.group import current_world

Draw = Literal["fresh", "fixed"]
Prepare = Callable[[Any], Any]

_logger = logging.getLogger("curvature_callbacks")


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
    of the training data. Dataset and collator are put back as they were: see `undisturbed`.

    Args:
        dataset: map-style, with `__len__`.
        collate: list of rows to a batch.
        num_microbatches: microbatches a probe.
        microbatch_size: rows of each; fewer when the dataset is smaller.
        prepare: what the loop does to a collated batch before the model sees it (transfer hooks, augmentation).
        rows: what the dataset may be indexed with; default `range(len(dataset))`.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        *,
        num_microbatches: int,
        microbatch_size: int,
        prepare: Prepare | None = None,
        rows: Sequence[Any] | None = None,
    ) -> None:
        self._dataset = dataset
        self._rows = rows
        self._prepare = prepare or (lambda batch: batch)
        self._collate = collate
        self._num_microbatches = num_microbatches
        self._microbatch_size = microbatch_size

    def draw(self, seed: int) -> list[Any]:
        """Rows without replacement, from a private generator; every process of a run has rows of its own.

        Where there are fewer rows than processes some have the same row. A microbatch of which the collator makes None is left
        out, as loops do.

        Raises:
            ProbeError: it makes None of all.
        """
        rows, world = range(len(self._dataset)) if self._rows is None else self._rows, current_world()
        drawn = min(self._num_microbatches * self._microbatch_size * world.size, len(rows))
        indices = random.Random(seed).sample(range(len(rows)), drawn)
        of_process = [rows[i] for i in islice(cycle(indices), world.rank, max(drawn, world.size), world.size)]
        collate = _private_copy(self._collate)
        with undisturbed(self._dataset, self._collate):
            batches = (
                collate(self._read(of_process[start : start + self._microbatch_size]))
                for start in range(0, len(of_process), self._microbatch_size)
            )
            microbatches = [self._prepare(batch) for batch in batches if batch is not None]
        if not microbatches:
            raise ProbeError(
                f"the collator returned None for each microbatch of a probe, {len(of_process)} rows in all, and nothing is "
                "left to measure: name rows that it keeps (`probe_dataset`), or draw more of them (`microbatch_size`)."
            )
        return microbatches

    def _read(self, rows: list[Any]) -> list[Any]:
        if getattr(self._dataset, "__getitems__", None):
            return list(self._dataset.__getitems__(rows))
        return [self._dataset[row] for row in rows]


@final
class FixedProbes(Probes):
    """The same microbatches at every probe."""

    def __init__(self, microbatches: Sequence[Any]) -> None:
        self._microbatches = list(microbatches)

    def draw(self, seed: int) -> list[Any]:
        """All of the microbatches, whatever the seed."""
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
        """The batches that were kept, oldest first; None before the first one."""
        return list(self._recent) or None


def probes_from_loader(
    loader: Any, *, num_microbatches: int, microbatch_size: int, prepare: Prepare | None = None
) -> DatasetProbes | None:
    """Probes on those rows of the loader's dataset that its sampler can draw, each as likely as the others.

    None when the dataset cannot be indexed (a stream, a combined loader, no collation). A sampler of a class that is not known
    is never iterated, which may move generators: probes draw from all rows then, and a warning says so where it has fewer.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    indexable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not indexable or isinstance(dataset, IterableDataset) or collate is None:
        return None
    if isinstance(loader, DataLoader) and loader.batch_size is None and loader.batch_sampler is None:
        return None
    rows = _rows_of(loader)
    check_dataset(dataset, rows)
    return DatasetProbes(
        dataset, collate, num_microbatches=num_microbatches, microbatch_size=microbatch_size, prepare=prepare, rows=rows
    )


def check_dataset(dataset: Any, rows: Sequence[Any] | None = None) -> None:
    """Raise a `ConfigurationError` for a dataset that cannot be indexed or has no rows, or without one among `rows`."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or isinstance(dataset, IterableDataset):
        raise ConfigurationError(
            f"`probe_dataset` must have `__getitem__` and `__len__`, so that rows can be drawn, got {type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise ConfigurationError("the dataset is empty: there is nothing to draw a probe from.")
    if rows is not None and len(rows) == 0:
        raise ConfigurationError("the sampler of the data draws no row: there is nothing to draw a probe from.")


def as_probes(probes: Any, *, num_microbatches: int, microbatch_size: int) -> Probes:
    """`probes` itself, fixed ones from a list of microbatches, or rows of a loader's dataset.

    Raises:
        ConfigurationError: none of these.
    """
    if isinstance(probes, Probes):
        return probes
    if isinstance(probes, list | tuple):
        return FixedProbes(probes)
    of_loader = probes_from_loader(probes, num_microbatches=num_microbatches, microbatch_size=microbatch_size)
    if of_loader is None:
        raise ConfigurationError(
            "`probes` must be a DataLoader over a map-style dataset, a list of microbatches or a Probes object, got "
            f"{type(probes).__name__}. For streams use CapturedProbes and offer it the training batches."
        )
    return of_loader


def _rows_of(loader: Any) -> Any:
    """What the loader's sampler can draw, None for all rows of its dataset."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, list | tuple):
        return [row for batch in batches for row in batch]
    sampler = _innermost(getattr(loader, "sampler", None) if batches is None else batches, loader.dataset)
    if isinstance(sampler, RandomSampler | SequentialSampler):
        rows: Any = range(len(sampler.data_source))
    elif isinstance(sampler, SubsetRandomSampler):
        rows = sampler.indices
    elif isinstance(sampler, WeightedRandomSampler):
        rows = (sampler.weights > 0).nonzero().flatten().tolist()
    elif isinstance(sampler, list | tuple | range | torch.Tensor) or type(sampler).__module__ == "numpy":
        rows = sampler
    else:
        _warn_of_fewer(sampler, loader)
        return None
    return None if isinstance(rows, range) and rows == range(len(loader.dataset)) else rows


def _innermost(sampler: Any, dataset: Any) -> Any:
    """The sampler of rows in batches of them, in accelerate's shards of such batches and in the shards of Lightning.

    The shards of PyTorch are of the rows of a dataset, those of Lightning of a dataset made of the entries of a sampler.
    """
    within: Any = None
    if isinstance(sampler, BatchSampler):
        within = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
    elif isinstance(sampler, DistributedSampler):
        sharded = getattr(sampler, "dataset", dataset)
        within = SequentialSampler(dataset) if sharded is dataset else sampler_behind(sharded)
    return sampler if within is None else _innermost(within, dataset)


def _warn_of_fewer(sampler: Any, loader: Any) -> None:
    """Say that probes draw from all rows, where `sampler` has fewer, but for batches and processes that are not full."""
    try:
        size = getattr(sampler, "batch_size") if sampler is loader.batch_sampler else 1  # noqa: B009 - of a class not known
        is_fewer = (len(sampler) + 1) * size * current_world().size <= len(loader.dataset)
    except (TypeError, AttributeError, NotImplementedError):  # it need not have a length
        return
    if is_fewer and current_world().rank == 0:
        _logger.warning(
            "curvature probes draw from the whole dataset of %d rows: which of them `%s` draws, of length %d, is not known. "
            "Pass `probe_dataset=` or `probe_dataloader=` (of a `Subset`, say) to measure on others. Training is not affected.",
            len(loader.dataset),
            type(sampler).__name__,
            len(sampler),
        )


def _private_copy(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """A copy that shares no counters and caches, or the collator itself where it is a method (of a LightningModule, say) or
    holds locks or files: generators and attributes are put back in either case."""
    if isinstance(collate, MethodType):
        return collate
    try:
        return copy.deepcopy(collate)
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError):
        return collate
