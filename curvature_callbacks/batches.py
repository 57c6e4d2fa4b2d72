"""Batches of any nesting: their rows, device and dtype."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from curvature_callbacks.errors import ConfigurationError

CONSTANTS: Final = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)


def map_tensors(
    batch: Any, function: Callable[[Tensor], Tensor], *, columns: Callable[[Any], Any] = lambda column: column
) -> Any:
    """`batch` with `function` applied to every tensor; containers keep their type, everything else is passed on.

    Containers are mappings, lists, tuples, dataclasses, packed sequences, and objects with `apply(function)` as graphs have it.

    Args:
        batch: of any nesting.
        function: of a tensor.
        columns: what becomes of lists of strings and numbers.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, PackedSequence):
        return _packed_like(batch, function)
    if is_column(batch):
        return columns(batch)
    inner = partial(map_tensors, function=function, columns=columns)
    if isinstance(batch, Mapping):
        return _mapping_like(batch, {key: inner(value) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(inner, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(inner, batch))
    if is_record(batch):
        return _record_like(batch, {field.name: inner(getattr(batch, field.name)) for field in fields(batch)})
    if callable(getattr(batch, "apply", None)) and hasattr(batch, "to") and not isinstance(batch, nn.Module):
        return copy.copy(batch).apply(function)  # it is changed in place
    return batch


def is_column(value: Any) -> bool:
    """Whether it is a list or tuple, not empty, of strings and numbers."""
    is_list = isinstance(value, list | tuple) and not hasattr(value, "_fields")
    return is_list and len(value) > 0 and all(isinstance(entry, CONSTANTS) for entry in value)


def is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass, whose fields are parts of the batch."""
    return is_dataclass(value) and not isinstance(value, type)


def sliced(batch: Any, rows: Tensor, num_rows: int) -> Any:
    """The given `rows` (an index tensor) of a batch of which every tensor has one row a row, or is a constant."""
    numbers = rows.tolist()

    def take(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.ndim and len(tensor) == num_rows else tensor

    def entries(column: Any) -> Any:
        return type(column)(column[row] for row in numbers)

    return map_tensors(batch, take, columns=entries)


def to_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """`batch` with every floating-point tensor in `dtype`, cut off from any graph it may hang on."""
    return map_tensors(batch, lambda tensor: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor)


def detached_copy(batch: Any) -> Any:
    """`batch` with every tensor cloned, so that what the training loop does to it later does not matter."""
    return map_tensors(batch, lambda tensor: tensor.detach().clone())


def _packed_like(packed: PackedSequence, function: Callable[[Tensor], Tensor]) -> PackedSequence:
    """`packed` with `function` applied to its tensors; sizes of its steps belong on the host."""
    order = (None if index is None else function(index) for index in (packed.sorted_indices, packed.unsorted_indices))
    return PackedSequence(function(packed.data), function(packed.batch_sizes).cpu(), *order)


def _record_like(original: Any, values: dict[str, Any]) -> Any:
    """A copy of a dataclass with these values, also where it is frozen; nothing it does when it is made is done again."""
    replica = copy.copy(original)
    for name, value in values.items():
        object.__setattr__(replica, name, value)
    return replica


def _mapping_like(original: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """`values` in a mapping of the original's type (Hugging Face's `BatchEncoding` has attributes a model may use)."""
    if type(original) is dict:
        return values
    replica = copy.copy(original)
    replica.update(values)  # type: ignore[attr-defined]
    return replica


def joined_content(first: Any, second: Any, sizes: tuple[int, int]) -> Any | None:
    """The rows of two batches in one, or None where they differ in more than their rows (types, keys, lengths, constants)."""
    return _joined(first, second, sizes)


def _joined(first: Any, second: Any, sizes: tuple[int, int]) -> Any | None:
    if type(first) is not type(second):
        return None
    if isinstance(first, Tensor):
        return _joined_tensors(first, second, sizes)
    if isinstance(first, Mapping):
        if list(first) != list(second):
            return None
        values = {key: _joined(first[key], second[key], sizes) for key in first}
        return None if any(value is None for value in values.values()) else _mapping_like(first, values)
    if is_record(first):
        values = {
            field.name: _joined(getattr(first, field.name), getattr(second, field.name), sizes) for field in fields(first)
        }
        return None if any(value is None for value in values.values()) else _record_like(first, values)
    if is_column(first) and is_column(second) and (len(first), len(second)) == sizes:
        return type(first)([*first, *second])
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return None
        parts: list[Any] = [_joined(*pair, sizes) for pair in zip(first, second, strict=True)]
        if any(value is None for value in parts):
            return None
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first if isinstance(first, CONSTANTS) and first == second else None


def _joined_tensors(first: Tensor, second: Tensor, sizes: tuple[int, int]) -> Tensor | None:
    if first.dtype != second.dtype or first.ndim != second.ndim:
        return None
    if first.ndim and (len(first), len(second)) == sizes:
        return torch.cat([first, second]) if first.shape[1:] == second.shape[1:] else None
    return first if torch.equal(first, second) else None


def cut_sequences(batch: Any, longest: int) -> Any:
    """A batch of token sequences with their first `longest` positions: axis 1 of everything as long as `input_ids`.

    Raises:
        ConfigurationError: it is no mapping with `input_ids`.
    """
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise ConfigurationError(
            "`max_sequence_length` cuts token sequences, and the batch is no mapping with `input_ids` (rows, positions): cut "
            "in the collator of a `probe_dataloader` instead."
        )
    length = tokens.shape[1]
    return map_tensors(batch, lambda value: value[:, :longest] if value.ndim > 1 and value.shape[1] == length else value)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
