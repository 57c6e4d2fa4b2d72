"""Scratch: memory and products that the Grams of one probe share."""

from collections import deque
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.linalg.accumulate import gram

_KEPT_ROWS: Final = 1024  # of a product that is remembered


@final
class Scratch:
    """What the Grams of one probe share: a buffer for all chunks, and the last products.

    Fresh memory for every chunk costs up to 14 % of the pass in page faults (one CPU thread). Weight and bias of a layer have
    the same output gradients, one after the other.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._last: deque[tuple[Tensor, Tensor]] = deque(maxlen=2)

    def gram(self, rows: Tensor) -> Tensor:
        """`rows @ rows.T` in float64; not to be changed in place."""
        for known, product in self._last:
            if known.data_ptr() == rows.data_ptr() and known.shape == rows.shape and known.stride() == rows.stride():
                return product
        product = gram(rows)
        if len(rows) <= _KEPT_ROWS:
            self._last.append((rows, product))
        return product

    def forget(self) -> None:
        """Let go of the last products, and of the buffer where the allocator keeps memory itself."""
        self._last.clear()
        if self._buffer is not None and self._buffer.device.type != "cpu":
            self._buffer = None

    def take(self, size: int, example: Tensor) -> Tensor:
        """`size` elements of `example`'s dtype and device, their content undefined."""
        buffer = self._buffer
        if buffer is None or buffer.numel() < size or buffer.dtype != example.dtype or buffer.device != example.device:
            self._buffer = None  # before another is made
            self._buffer = buffer = torch.empty(size, dtype=example.dtype, device=example.device)
        return buffer[:size]
