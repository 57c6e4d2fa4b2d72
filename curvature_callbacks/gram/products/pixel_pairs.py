"""Gram of a convolution kernel from inner products of pixels, for many channels on few positions."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.gram.products.limits import PRODUCT_LIMITS, ProductLimits
from curvature_callbacks.gram.uses.convolution import Convolution, Geometry

_SHIFT_COST: Final = 20  # operations of a matrix product that take as long as adding up one shifted pair (a CPU thread)


def pairs_are_cheaper(uses: Sequence[Convolution], limits: ProductLimits = PRODUCT_LIMITS) -> bool:
    """Whether `pair_gram` can take these uses, with less work than by way of per-sample gradients."""
    return all(use.has_own_images and _shape(use) == _shape(uses[0]) for use in uses) and _cheaper(uses, limits.pixel_bytes)


def pair_gram(uses: Sequence[Convolution], limits: ProductLimits = PRODUCT_LIMITS) -> Tensor:
    """`K_ij = sum_{t,s} (b_it . b_js) sum_o x_{i,t+o} . x_{j,s+o}`, (S, S) float64.

    b are output gradients, x input pixels, t and s output positions, o the offsets of the kernel: products of pixels are
    taken once for all offsets, so that a kernel costs no more than its largest side.

    Args:
        uses: one a pass, of one kernel, with one image a sample; see `pairs_are_cheaper`.
        limits: size of the tiles.

    Cost: `N^2 (T_in^2 C_in + T_out^2 C_out)` operations against `2 N T_out P + N^2 P` with gradients, P = kernel elements.
    Memory: at most three times 16 MiB of pairs.
    """
    return _Pairs(uses, limits).gram()


def _cheaper(uses: Sequence[Convolution], most_bytes: int) -> bool:
    first = uses[0]
    N = sum(use.num_samples for use in uses)
    C, T = first.inputs.shape[1], prod(first.inputs.shape[2:])
    D, t = first.output_gradients.shape[1], prod(first.output_gradients.shape[2:])
    offsets = prod(first.geometry.kernel)
    pairs = N * N * (T * T * C + t * t * D + _SHIFT_COST * offsets * t * t)
    sample_bytes = N * max(T, t) ** 2 * first.inputs.element_size()
    return sample_bytes <= most_bytes and pairs < (2 * N * t + N * N) * C * D * offsets


def _shape(use: Convolution) -> tuple[object, ...]:
    return use.geometry, use.inputs.shape[1:], use.output_gradients.shape[1:]


def _positions_first(images: Tensor) -> Tensor:
    """`images` (samples, channels, ...) as (positions, samples, channels)."""
    return images.flatten(2).permute(2, 0, 1)


@final
class _Pairs:
    """Products of pixels for tiles of the Gram, some samples high; what is below the diagonal is mirrored."""

    def __init__(self, uses: Sequence[Convolution], limits: ProductLimits) -> None:
        self._limits = limits
        self._pixels = torch.cat([_positions_first(use.inputs) for use in uses], 1)
        self._outputs = torch.cat([_positions_first(use.output_gradients) for use in uses], 1)
        self._in_grid = uses[0].inputs.shape[2:]
        self._out_grid = uses[0].output_gradients.shape[2:]
        self._windows = list(_windows(self._in_grid, self._out_grid, uses[0].geometry))

    def gram(self) -> Tensor:
        N = self._pixels.shape[1]
        total = torch.empty(N, N, dtype=torch.float64, device=self._pixels.device)
        for start, stop in self._tiles(N):
            tile = self._tile(start, stop)
            total[start:stop, start:] = tile
            total[stop:, start:stop] = tile[:, stop - start :].T
        return total

    def _tiles(self, N: int) -> Iterator[tuple[int, int]]:
        sample_bytes = N * max(len(self._pixels), len(self._outputs)) ** 2 * self._pixels.element_size()
        height = min(max(self._limits.fewest_samples, N // 4), max(1, self._limits.pixel_bytes // sample_bytes))
        for start in range(0, N, height):
            yield start, min(start + height, N)

    def _tile(self, start: int, stop: int) -> Tensor:
        """(stop - start, N - start) of the Gram, from its diagonal on."""
        pixels = _products(self._pixels, start, stop, self._in_grid)
        outputs = _products(self._outputs, start, stop, self._out_grid)
        patches = torch.zeros_like(outputs)
        for at, source in self._windows:
            patches[(*at, slice(None), *at)] += pixels[(*source, slice(None), *source)]
        n = len(self._out_grid)
        over_right = patches.mul_(outputs).flatten(0, n - 1).flatten(2, n + 1).sum(2)
        return over_right.sum(0, dtype=torch.float64)


def _products(values: Tensor, start: int, stop: int, grid: Sequence[int]) -> Tensor:
    """(*grid, stop - start, *grid, N - start) inner products of `values` (positions, N, channels)."""
    left, right = values[:, start:stop].flatten(0, 1), values[:, start:].flatten(0, 1)
    return (left @ right.T).view(*grid, stop - start, *grid, values.shape[1] - start)


def _windows(
    in_grid: Sequence[int], out_grid: Sequence[int], geometry: Geometry
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For every offset of the kernel the output positions that see a pixel there, and these pixels."""
    axes = zip(in_grid, out_grid, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    ranges = [
        [_window(size, positions, stride, k * dilation - padding) for k in range(kernel)]
        for size, positions, kernel, stride, padding, dilation in axes
    ]
    for chosen in product(*ranges):
        yield tuple(at for at, _ in chosen), tuple(pixels for _, pixels in chosen)


def _window(size: int, positions: int, stride: int, shift: int) -> tuple[slice, slice]:
    """On one axis, the output positions t with `0 <= t stride + shift < size` and the pixels they see; both may be empty."""
    start = max(0, -(shift // stride))
    stop = max(start, min(positions, (size - 1 - shift) // stride + 1))
    return slice(start, stop), slice(start * stride + shift, max(0, (stop - 1) * stride + shift + 1), stride)
