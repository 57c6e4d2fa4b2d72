"""Arguments of intercepted operations: the tensors in them, and other arguments in their place."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks.library_internals.tensors import without_dispatch

_NESTED: Final = (list, tuple)  # a union is made anew at every call, and this is called for every operation


@cache
def opened_attention() -> Callable[..., Any] | None:
    """`F.multi_head_attention_forward` so that the operations inside are seen; None where torch's cannot be opened."""
    return without_dispatch(F.multi_head_attention_forward)


def plain_index(index: Any) -> Any:
    """Integer tensors without axes as integers, so that what they pick is a view (an expert's weight)."""
    if isinstance(index, tuple):
        return tuple(plain_index(part) for part in index)
    plain = isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point() and index.dtype != torch.bool
    return int(index) if plain else index


def first_size(args: Any) -> Any:
    """The first of sizes given one by one or as one sequence."""
    return args[0][0] if isinstance(args[0], list | tuple | torch.Size) else args[0]


def replaced(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`values` with `function` applied to every tensor in them."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, Mapping):
        return {key: replaced(value, function) for key, value in values.items()}
    if isinstance(values, list | tuple) and not isinstance(values, torch.Size):
        return type(values)(replaced(value, function) for value in values)
    return values


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors in nested lists and tuples."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, _NESTED):
            tensors += tensors_in(value)
    return tensors
