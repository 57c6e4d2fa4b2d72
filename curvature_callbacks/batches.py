"""Batches of any nesting: their rows, device and dtype."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError

_COMPARED_BY_VALUE: Final = (bool, int, float, str)  # values of a batch that are the same where they are equal


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`batch` with `function` applied to every tensor; containers keep their type, everything else is passed on."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return _mapping_like(batch, {key: map_tensors(value, function) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def as_microbatches(batches: Any) -> list[Any]:
    """The microbatches in `batches`: a list of them, or a single one (a mapping, a tuple, a tensor, a list of tensors)."""
    if isinstance(batches, list) and not (batches and isinstance(batches[0], Tensor)):
        return batches
    return [batches]


def batch_size(batch: Any) -> int:
    """Rows of `batch`: the leading dimension of `labels` where there are any, else of its first tensor."""
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor) and batch["labels"].ndim:
        return int(batch["labels"].shape[0])
    for tensor in _nested_tensors(batch):
        if tensor.ndim:
            return int(tensor.shape[0])
    raise ConfigurationError(
        f"a microbatch of type {type(batch).__name__} holds no tensor with rows: give a tensor, a tuple or a mapping."
    )


def take_rows(batch: Any, rows: Tensor) -> Any:
    """The given `rows` (an index tensor) of every tensor in `batch` whose leading dimension is the batch size."""
    size = batch_size(batch)

    def take(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.ndim and tensor.shape[0] == size else tensor

    return map_tensors(batch, take)


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor on `device`."""
    return map_tensors(batch, lambda tensor: tensor.to(device))


def to_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """`batch` with every floating-point tensor in `dtype`, cut off from any graph it may hang on."""
    return map_tensors(batch, lambda tensor: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor)


def detached_copy(batch: Any) -> Any:
    """`batch` with every tensor cloned, so that what the training loop does to it later does not matter."""
    return map_tensors(batch, lambda tensor: tensor.detach().clone())


def _nested_tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _nested_tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _nested_tensors(value)


def _mapping_like(original: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """`values` in a mapping of the original's type (Hugging Face's `BatchEncoding` has attributes a model may use)."""
    if type(original) is dict:
        return values
    replica = copy.copy(original)
    replica.update(values)  # type: ignore[attr-defined]
    return replica


def at_most(microbatches: Sequence[Any], rows: int) -> list[Any]:
    """The same rows in microbatches of at most so many."""
    smaller: list[Any] = []
    for batch in microbatches:
        size = batch_size(batch)
        pieces = [torch.arange(start, min(start + rows, size)) for start in range(0, size, rows)]
        smaller += [batch] if size <= rows else [take_rows(batch, piece) for piece in pieces]
    return smaller


def joined_batches(first: Any, second: Any) -> Any | None:
    """The rows of two batches in one, or None where they differ in more than their rows (types, keys, lengths, constants)."""
    return _joined(first, second, (batch_size(first), batch_size(second)))


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
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return None
        parts: list[Any] = [_joined(*pair, sizes) for pair in zip(first, second, strict=True)]
        if any(value is None for value in parts):
            return None
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first if isinstance(first, _COMPARED_BY_VALUE) and first == second else None


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
