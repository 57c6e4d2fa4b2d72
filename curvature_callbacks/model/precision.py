"""The dtype a model is measured in: its own, but never less than float32."""

from collections.abc import Iterable

import torch
from torch import Tensor


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a second derivative has no digits left in it: bfloat16 and float16."""
    return dtype in (torch.bfloat16, torch.float16)


def compute_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """float32, or wider where one of these is."""
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def widened(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """`tensor` in `dtype` where its own is narrow, else itself."""
    return tensor.to(dtype) if is_narrow(tensor.dtype) else tensor
