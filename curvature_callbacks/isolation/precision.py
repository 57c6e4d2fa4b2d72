"""Precision: products of float32 without TF32 or bfloat16 inside a probe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Full float32 products. The newer per-backend switch where there is one: reading the old global switch raises
    once a user has touched the new one."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    of_cudnn = [getattr(cudnn, operation, None) for operation in ("conv", "rnn")]
    backends: list[Any] = [cuda.matmul, *of_cudnn, getattr(mkldnn, "matmul", None)]
    saved = [(backend, backend.fp32_precision) for backend in backends if hasattr(backend, "fp32_precision")]
    legacy = None if saved else torch.get_float32_matmul_precision()
    allowed = _cudnn_switch()
    try:
        if allowed is not None:
            cudnn.allow_tf32 = False  # `cudnn.flags`, which models have around a CTC loss, raises where it differs from the new
        for backend, _ in saved:
            backend.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if allowed is not None:
            cudnn.allow_tf32 = allowed  # first: it sets the new ones too
        for backend, precision in saved:
            backend.fp32_precision = precision
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)


def _cudnn_switch() -> bool | None:
    """cuDNN's old switch, None where the user's own settings of the new ones have made reading it an error."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return None
