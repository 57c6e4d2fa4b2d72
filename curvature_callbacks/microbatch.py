"""Microbatch: what one forward pass of a probe takes, how many rows it has, and what they can be taken apart by."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from curvature_callbacks.batches import joined_content, map_tensors, sliced, to_dtype
from curvature_callbacks.errors import ConfigurationError, RefusedError
from curvature_callbacks.layout import counted_rows, has_one_row_each
from curvature_callbacks.packing import packed_rows

Collate = Callable[[Sequence[int]], Any]  # positions of rows in a microbatch to the content that these alone make


@final
@dataclass(frozen=True, slots=True, eq=False)
class RowsAmong:
    """Rows of a batch by their places in it.

    Attributes:
        rows: index tensor on the host.
        num_rows: of the batch.
    """

    rows: Tensor
    num_rows: int

    def taken(self, rows: Tensor) -> "RowsAmong":
        """Some of these rows."""
        return RowsAmong(self.rows[rows.cpu()], self.num_rows)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """A batch that knows its rows.

    Rows are taken out of it in one of three ways: tensors are sliced where each has one row a row of the batch; else the rows
    are collated anew where they were drawn from a data set; else not at all, and the microbatch *stays whole*: nothing cuts
    it, neither memory nor a measurement of single rows. A layout that is not known is never sliced.

    Attributes:
        content: what the loss is called with.
        num_rows: rows, as they were drawn; 1 where that is not known.
        are_rows_known: whether it is. A batch of unknown rows stays whole, counts as much as any other, and has a loss of all
            its rows together only.
        seed: of the random draws that its loss makes, one a probe; pieces of it have the same. None until a probe gives it.
        is_sliceable: whether every tensor has one row a row.
        collate: makes the content of some of its rows; None where these are not at hand.
        among: of a piece, the rows of the batch that it was taken out of, whose random draws it has; None for what was drawn.
        packed: the batch of which every row packs several of these rows, as it was drawn; None for what was not packed.
    """

    content: Any
    num_rows: int
    are_rows_known: bool = True
    seed: int | None = None
    is_sliceable: bool = False
    collate: Collate | None = None
    among: RowsAmong | None = None
    packed: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether no row can be taken out of it; one of a single row needs none to be."""
        return not self.are_rows_known or (self.num_rows > 1 and not self.is_sliceable and self.collate is None)

    def __getitem__(self, key: Any) -> Any:
        """`content[key]`, so that who reads a batch need not know what it lies in."""
        return self.content[key]

    def __iter__(self) -> Iterator[Any]:
        """What `content` iterates over: the keys of a mapping, inputs and targets of a pair."""
        return iter(self.content)

    def take(self, rows: Tensor) -> "Microbatch":
        """The given rows (an index tensor) as a microbatch, with the same seed. Cost: a copy, or reading and collating them.

        Raises:
            RefusedError: it stays whole.
        """
        numbers = rows.tolist()
        if numbers == list(range(self.num_rows)) and self.are_rows_known:
            return self
        among = RowsAmong(rows.cpu(), self.num_rows) if self.among is None else self.among.taken(rows)
        if self.is_sliceable:
            content = sliced(self.content, rows, self.num_rows)
            collate = None if self.collate is None else _among(self.collate, numbers)
            return replace(self, content=content, num_rows=len(rows), collate=collate, among=among, packed=None)
        if self.collate is None:
            reason = (
                f"its tensors have not one row each for its {self.num_rows} rows (pairs, ragged lists)"
                if self.are_rows_known
                else "how many rows its batches have is not known, because its tensors do not agree on that"
            )
            raise RefusedError(
                f"rows of a microbatch cannot be taken apart: {reason}, and there is no data set to collate single rows of. "
                "Measure on a data set (`probe_dataset`), take one row a microbatch, or return one loss per row."
            )
        collate = _among(self.collate, numbers)
        return replace(self, content=self.collate(numbers), num_rows=len(rows), collate=collate, among=among, packed=None)

    def singles(self) -> "Iterator[Microbatch]":
        """Its rows one by one. Raises a `RefusedError` where it stays whole."""
        return (self.take(row) for row in torch.arange(self.num_rows)[:, None])

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Microbatch":
        """The same rows with `function` applied to every tensor, also of what is collated later."""
        collate = None if self.collate is None else _mapped(self.collate, function)
        packed = None if self.packed is None else map_tensors(self.packed, function)
        return replace(self, content=map_tensors(self.content, function), collate=collate, packed=packed)

    def as_packed(self) -> "Microbatch":
        """The batch as it was drawn, of packed rows; itself where it was not packed."""
        if self.packed is None:
            return self
        num_rows = counted_rows(self.packed) or 1
        is_sliceable = has_one_row_each(self.packed, num_rows)
        return Microbatch(content=self.packed, num_rows=num_rows, seed=self.seed, is_sliceable=is_sliceable)

    def in_dtype(self, dtype: torch.dtype) -> "Microbatch":
        """The same rows with floating-point tensors in `dtype`, cut off from any graph they hang on."""
        return self.mapped(partial(to_dtype, dtype=dtype))

    def on(self, device: torch.device) -> "Microbatch":
        """The same rows on `device`."""
        return self.mapped(lambda tensor: tensor.to(device))


def as_microbatch(batch: Any) -> Microbatch:
    """`batch` itself, or a batch of the user's with its rows counted by inspection.

    Raises:
        ConfigurationError: its tensors do not agree on a number of rows.
    """
    if isinstance(batch, Microbatch):
        return batch
    num_rows = counted_rows(batch)
    if num_rows is None:
        raise ConfigurationError(
            f"a microbatch of type {type(batch).__name__} does not tell how many rows it has (its tensors have different "
            "leading dimensions, or there are none): say so by `Microbatch(content=batch, num_rows=...)`."
        )
    return drawn_microbatch(batch, num_rows)


def drawn_microbatch(content: Any, num_rows: int, *, collate: Collate | None = None) -> Microbatch:
    """A batch that was made of so many rows, which `collate` makes anew where slices will not do.

    Where rows pack several sequences, each of these is a row.
    """
    apart = unpacked_microbatch(content)
    if apart is not None:
        return apart
    is_sliceable = has_one_row_each(content, num_rows)
    return Microbatch(content=content, num_rows=num_rows, is_sliceable=is_sliceable, collate=collate)


def unpacked_microbatch(content: Any) -> Microbatch | None:
    """A batch of packed rows with a row for each sequence; None where each row of it is one already."""
    sequences = packed_rows(content)
    if sequences is None:
        return None
    num_rows = len(sequences.places)
    if sequences.wastes:
        return Microbatch(content=content, num_rows=num_rows, collate=sequences.padded, packed=content)
    apart = sequences.padded(range(num_rows))
    return Microbatch(content=apart, num_rows=num_rows, is_sliceable=True, packed=content)


def as_microbatches(batches: Any) -> list[Any]:
    """The microbatches in `batches`: a list of them, or a single one (a mapping, a tuple, a tensor, a list of tensors)."""
    if isinstance(batches, list) and not (batches and isinstance(batches[0], Tensor)):
        return batches
    return [batches]


def few_rows(microbatch: Microbatch) -> Microbatch:
    """Its first two rows as a batch with a draw of its own; all of it where it stays whole."""
    return (
        microbatch if microbatch.is_whole else replace(microbatch.take(torch.arange(min(2, microbatch.num_rows))), among=None)
    )


def at_most(microbatches: Iterable[Microbatch], rows: int) -> list[Microbatch]:
    """The same rows in microbatches of at most so many, but for those that stay whole."""
    smaller: list[Microbatch] = []
    for microbatch in microbatches:
        size = microbatch.num_rows
        if size <= rows or microbatch.is_whole:
            smaller.append(microbatch)
        else:
            smaller += [microbatch.take(piece) for piece in torch.split(torch.arange(size), rows)]
    return smaller


def joined(first: Microbatch, second: Microbatch) -> Microbatch | None:
    """The rows of both in one, or None where they cannot be put together.

    They differ in more than their rows (types, keys, lengths, constants), are not made of slices, or draw at random.
    """
    if not (first.is_sliceable and second.is_sliceable):
        return None
    content = joined_content(first.content, second.content, (first.num_rows, second.num_rows))
    if content is None:
        return None
    return replace(first, content=content, num_rows=first.num_rows + second.num_rows, collate=None, among=None, packed=None)


def _among(collate: Collate, numbers: Sequence[int]) -> Collate:
    return lambda rows: collate([numbers[row] for row in rows])


def _mapped(collate: Collate, function: Callable[[Tensor], Tensor]) -> Collate:
    return lambda rows: map_tensors(collate(rows), function)
