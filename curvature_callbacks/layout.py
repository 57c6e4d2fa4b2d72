"""Layout of a batch: how many rows its tensors speak of, and whether each has exactly one row a row."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from curvature_callbacks.batches import CONSTANTS, is_column, is_record


def has_one_row_each(content: Any, num_rows: int) -> bool:
    """Whether every tensor has exactly `num_rows` rows, so that rows are slices.

    Lists of strings or numbers have as many entries; a tensor without axes is a constant. False for whatever is not known to
    have rows: packed and nested tensors, objects, lists that may hold one tensor a row.
    """
    return _has_rows(content, num_rows, is_top=True)


def counted_rows(content: Any) -> int | None:
    """The number of rows that the parts of a batch agree on; None where they do not.

    Where there are `labels`, rows are theirs.
    """
    labels = content.get("labels") if isinstance(content, Mapping) else None
    if isinstance(labels, Tensor) and labels.ndim:
        return len(labels)
    possible = list(_possible_counts(content, is_top=True))
    telling = [counts for counts in possible if counts != {1}] or possible  # one row may be a constant
    agreed = set.intersection(*telling) if telling else set()
    return agreed.pop() if len(agreed) == 1 else None


def has_rows(content: Any) -> bool:
    """Whether a part of a batch has rows, however many."""
    return any(True for _ in _possible_counts(content, is_top=True))


def parts_of(value: Any) -> Iterable[Any] | None:
    """What a mapping, list, tuple or dataclass holds; None for whatever is no container."""
    if isinstance(value, PackedSequence):
        return None
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return value
    return [getattr(value, field.name) for field in fields(value)] if is_record(value) else None


def _has_rows(value: Any, num_rows: int, *, is_top: bool) -> bool:
    if isinstance(value, Tensor):
        is_plain = value.layout is torch.strided and not value.is_nested
        return is_plain and (value.ndim == 0 or len(value) == num_rows)
    if isinstance(value, CONSTANTS):
        return True
    parts = parts_of(value)
    if is_column(value):
        return len(value) == num_rows
    if parts is None or (not is_top and _may_list_rows(value) and len(value) == num_rows > 1):
        return False
    return all(_has_rows(part, num_rows, is_top=False) for part in parts)


def _may_list_rows(value: Any) -> bool:
    """Whether it may have one entry a row: entries of one kind, tensors of one dtype and as many axes."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields") or not value:
        return False
    kinds = {(type(each), each.dtype, each.ndim) if isinstance(each, Tensor) else type(each) for each in value}
    return len(kinds) == 1


def _possible_counts(value: Any, *, is_top: bool) -> Iterator[set[int]]:
    """For every part that has rows the numbers of them that it may have."""
    if isinstance(value, PackedSequence):
        yield {int(value.batch_sizes[0])}
    elif isinstance(value, Tensor):
        if value.ndim:
            yield {value.size(0)}
    elif not is_top and _may_list_rows(value):
        yield {len(value), *_common_length(value)}
    else:
        for part in parts_of(value) or ():
            yield from _possible_counts(part, is_top=False)


def _common_length(values: Iterable[Any]) -> set[int]:
    """The length of tensors that are all as long."""
    lengths = {len(value) if isinstance(value, Tensor) and value.ndim else None for value in values}
    return {length for length in lengths if length is not None} if len(lengths) == 1 else set()
