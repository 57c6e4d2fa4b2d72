"""Scratch: memory and products that the Grams of one probe share."""

from collections import deque
from collections.abc import Sequence
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.linalg.accumulate import gram

_KEPT_SIZE: Final = 1024  # of a product (S, S) that is remembered


@final
class Scratch:
    """What the Grams of one probe share: a buffer for all chunks, and the last products.

    Fresh memory for every chunk costs up to 14 % of the pass in page faults (one CPU thread). Weight and bias of a layer have
    the same output gradients, one after the other.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._last: deque[tuple[Sequence[Tensor], Tensor]] = deque(maxlen=2)

    def gram(self, parts: Sequence[Tensor]) -> Tensor:
        """`G @ G.T` in float64, G all `parts` (n, P) one below the other; not to be changed in place."""
        for known, product in self._last:
            if len(known) == len(parts) and all(map(_are_same, known, parts)):
                return product
        product = gram(parts[0] if len(parts) == 1 else torch.cat(list(parts)))
        if len(product) <= _KEPT_SIZE:
            self._last.append((parts, product))
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


def _are_same(known: Tensor, part: Tensor) -> bool:
    return known.data_ptr() == part.data_ptr() and known.shape == part.shape and known.stride() == part.stride()
