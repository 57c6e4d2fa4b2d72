"""Probes of data that can be indexed: rows of a map-style dataset, collated as the loader does it."""

import copy
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from types import MethodType
from typing import Any, final

from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.isolation.model import seeded
from curvature_callbacks.isolation.snapshot import undisturbed
from curvature_callbacks.layout import counted_rows
from curvature_callbacks.microbatch import Microbatch, drawn_microbatch, unpacked_microbatch
from curvature_callbacks.probes.base import FixedProbes, Prepare, Probes
from curvature_callbacks.probes.batch_sizes import training_batch_size
from curvature_callbacks.probes.samplers import groups_of, rows_of
from curvature_callbacks.processes.group import current_world

Collator = Callable[[list[Any]], Any]


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
        groups: parts of the dataset's rows, of one of which a batch is made; default all rows are one. `rows` does not apply.
        batch_size: rows of a training batch of this process; None where it is not known: a whole batch then has all rows of a
            probe.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collator,
        *,
        num_microbatches: int,
        microbatch_size: int,
        prepare: Prepare | None = None,
        rows: Sequence[Any] | None = None,
        groups: Sequence[Sequence[Any]] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self._groups = groups
        self._dataset = dataset
        self._rows = rows
        self._prepare = prepare or (lambda batch: batch)
        self._collate = collate
        self._num_microbatches = num_microbatches
        self._microbatch_size = microbatch_size
        self._batch_size = batch_size

    @override
    def draw(self, seed: int) -> list[Microbatch]:
        """Rows without replacement, from a private generator; every process of a run has rows of its own.

        Where there are fewer rows than processes some have the same row. A microbatch of which the collator makes None is left
        out, as loops do, and rows that it leaves out are not counted. Where its tensors have not one row each for every row
        that was read, the rows are kept as they were read, to be collated anew where single ones are asked for.

        Raises:
            ProbeError: it makes None of all.
        """
        return self._drawn(seed, self._num_microbatches, self._microbatch_size)

    @override
    def draw_whole(self, seed: int) -> list[Microbatch]:
        """As many batches of the size of training as the rows of a probe make, at least one, each of as many rows."""
        asked, available = self._num_microbatches * self._microbatch_size, len(self._drawable) // current_world().size
        size = min(self._batch_size or asked, max(1, available))
        return self._drawn(seed, max(1, min(asked, available) // size), size)

    @property
    def _drawable(self) -> Sequence[Any]:
        return range(len(self._dataset)) if self._rows is None else self._rows

    def _drawn(self, seed: int, count: int, size: int) -> list[Microbatch]:
        """`count` microbatches of `size` rows, fewer where the dataset has fewer."""
        parts = (
            self._parts(seed, count, size) if self._groups is None else self._parts_of_groups(self._groups, seed, count, size)
        )
        collate = _private_copy(self._collate)
        with undisturbed(self._dataset, self._collate):
            microbatches = [made for part in parts if (made := self._microbatch(collate, self._read(part), seed)) is not None]
        if not microbatches:
            raise ProbeError(
                f"the collator returned None for each microbatch of a probe, {sum(map(len, parts))} rows in all, and nothing "
                "is left to measure: name rows that it keeps (`probe_dataset`), or draw more of them (`microbatch_size`)."
            )
        return microbatches

    def _parts(self, seed: int, count: int, size: int) -> list[list[Any]]:
        """The rows of each microbatch of this process."""
        rows, world = self._drawable, current_world()
        drawn = min(count * size * world.size, len(rows))
        indices = random.Random(seed).sample(range(len(rows)), drawn)
        of_process = [rows[i] for i in islice(cycle(indices), world.rank, max(drawn, world.size), world.size)]
        return [of_process[start : start + size] for start in range(0, len(of_process), size)]

    def _parts_of_groups(self, groups: Sequence[Sequence[Any]], seed: int, count: int, size: int) -> list[list[Any]]:
        """The same, each microbatch of rows of one group; groups are taken by their sizes."""
        generator, world = random.Random(seed), current_world()
        chosen = generator.choices(range(len(groups)), weights=[len(group) for group in groups], k=count * world.size)
        wanted = {number: min(chosen.count(number) * size, len(groups[number])) for number in sorted(set(chosen))}
        drawn = {number: cycle(generator.sample(groups[number], amount)) for number, amount in wanted.items()}
        parts = [list(islice(drawn[number], min(size, len(groups[number])))) for number in chosen]
        return parts[world.rank :: world.size]

    def _microbatch(self, collate: Collator, items: list[Any], seed: int) -> Microbatch | None:
        kept = [_shallow_copy(item) for item in items]
        content = collate(items)
        if content is None:
            return None
        content = self._prepare(content)
        apart = unpacked_microbatch(content)
        if apart is not None:
            return apart
        again = partial(self._collated, collate, kept, seed)
        if (counted_rows(content) or len(kept)) < len(kept):
            kept[:] = _kept_by(again, kept, counted_rows(content))
        return drawn_microbatch(content, len(kept), collate=again)

    def _collated(self, collate: Collator, items: list[Any], seed: int, rows: Sequence[int]) -> Any:
        """What the collator and the loop make of these rows alone, the same at every call."""
        with undisturbed(self._dataset, self._collate), seeded(nn.Module(), seed=seed):
            content = collate([_shallow_copy(items[row]) for row in rows])
            if content is None:
                raise ProbeError("the collator returned None for some rows of a microbatch and not for all of them.")
            return self._prepare(content)

    def _read(self, rows: list[Any]) -> list[Any]:
        if getattr(self._dataset, "__getitems__", None):
            return list(self._dataset.__getitems__(rows))
        return [self._dataset[row] for row in rows]


def probes_from_loader(
    loader: Any,
    *,
    num_microbatches: int,
    microbatch_size: int,
    prepare: Prepare | None = None,
    batch_size: int | None = None,
) -> DatasetProbes | None:
    """Probes on those rows of the loader's dataset that its sampler can draw, each as likely as the others.

    None when the dataset cannot be indexed (a stream, a combined loader, no collation). A sampler of a class that is not known
    is never iterated, which may move generators: probes draw from all rows then, and a warning says so where it has fewer.
    `batch_size` is that of training; default the loader's.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    indexable = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not indexable or isinstance(dataset, IterableDataset) or collate is None:
        return None
    if isinstance(loader, DataLoader) and loader.batch_size is None and loader.batch_sampler is None:
        return None
    groups = groups_of(loader)
    rows = rows_of(loader) if groups is None else None
    check_dataset(dataset, rows)
    return DatasetProbes(
        dataset,
        collate,
        num_microbatches=num_microbatches,
        microbatch_size=microbatch_size,
        prepare=prepare,
        rows=rows,
        groups=groups,
        batch_size=training_batch_size(loader) if batch_size is None else batch_size,
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


def _private_copy(collate: Collator) -> Collator:
    """A copy that shares no counters and caches, or the collator itself where it is a method (of a LightningModule, say) or
    holds locks or files: generators and attributes are put back in either case."""
    if isinstance(collate, MethodType):
        return collate
    try:
        return copy.deepcopy(collate)
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError):
        return collate


def _shallow_copy(item: Any) -> Any:
    """A copy of an item's own level: collators take keys out of the rows that they are given."""
    return copy.copy(item) if isinstance(item, dict | list) else item


def _kept_by(collated: Callable[[Sequence[int]], Any], items: list[Any], num_rows: int | None) -> list[Any]:
    """The items of which a collator makes a row each, where these are all of `num_rows`; else all items.

    It may leave rows out (of files that cannot be read, say), or make one packed row of several.
    """
    kept = [item for row, item in enumerate(items) if _makes_one_row(collated, row)]
    return kept if len(kept) == num_rows else items


def _makes_one_row(collated: Callable[[Sequence[int]], Any], row: int) -> bool:
    try:
        return counted_rows(collated([row])) == 1
    except Exception:  # whatever a collator raises when it is left with no row at all
        return False
