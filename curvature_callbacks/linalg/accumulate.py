"""Inner products over the parameter axis with float64 partial sums.

A float32 sum over P = 1e7 terms is wrong by 2e-3 on CPU (`G @ G.T`, N = 8) and a float32 norm by 1e-2 at P = 1e8. Products
of short column chunks in the input's dtype, added up in float64, bring this to 4e-8 at no extra cost.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

_CPU_CHUNK: Final = 1 << 12  # columns on a CPU: the trace of a 1.3 M weight's Gram was off by 1e-5 with 32k, 9e-7 with 4k

_BASIS_CHUNK: Final = 1 << 14  # columns of a basis on a CPU: a third faster than 4 k; a Gram's trace adds up more such sums

_CHUNKS_AT_ONCE: Final = 1 << 6  # of a dot product: their products stay in the cache

_LEAST_TILE: Final = 32  # vectors of a tile of a Gram: below that products mostly lose more speed than symmetry saves ...

_SMALL_TILES: Final = ((16, 4), (64, 16))  # ... but on a CPU, of fewer vectors than the first, the second save 7 to 30 %

_LEAST_MIRRORED: Final = 1 << 24  # multiplications of a Gram from which on mirrored tiles pay for their copies

_ACCELERATOR_CHUNK: Final = 1 << 22  # accelerators sum in trees; few launches matter more there (not measured)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """`x . y` for vectors of equal length, as a 0-d float64 tensor on their device.

    All chunks in one matrix: a sixth of the time of a product for each (670 k entries), half at 4.5 M.
    """
    step = _step(x)
    stop = len(x) // step * step  # of the chunks that are full
    total = (x[stop:] @ y[stop:]).to(torch.float64)
    for start in range(0, stop, _CHUNKS_AT_ONCE * step):
        part = slice(start, min(start + _CHUNKS_AT_ONCE * step, stop))
        total += torch.linalg.vecdot(x[part].view(-1, step), y[part].view(-1, step)).sum(dtype=torch.float64)
    return total


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of a vector, as a 0-d float64 tensor on its device."""
    return dot(x, x).sqrt()


def gram(vectors: Tensor) -> Tensor:
    """`vectors @ vectors.T` for `vectors` (N, P), as an (N, N) float64 tensor on their device.

    One batched product over the chunks (0.6 to 0.9 of the time of a loop on a CPU); for many vectors tile by tile, the
    tiles below the diagonal mirrored.
    """
    N, P = vectors.shape
    step = _step(vectors)
    if step >= P:
        return _product(vectors).to(torch.float64)
    num_chunks = P // step
    total = torch.zeros(N, N, dtype=torch.float64, device=vectors.device)
    chunks = vectors[:, : num_chunks * step].reshape(N, num_chunks, step).transpose(0, 1)
    _add_products(total, chunks)
    if P % step:
        total += _product(vectors[:, num_chunks * step :])
    return total


def _product(vectors: Tensor) -> Tensor:
    """`vectors @ vectors.T` for `vectors` (N, P), in their dtype."""
    N, P = vectors.shape
    if N * N * P < _LEAST_MIRRORED:
        return vectors @ vectors.T
    result = vectors.new_empty(N, N)
    height = _height(vectors)
    for start in range(0, N, height):
        stop = min(start + height, N)
        torch.mm(vectors[start:stop], vectors[start:].T, out=result[start:stop, start:])
        result[stop:, start:stop] = result[start:stop, stop:].T
    return result


def _add_products(total: Tensor, chunks: Tensor) -> None:
    """`total += sum_c chunks_c @ chunks_c.T` for `chunks` (c, N, columns)."""
    N = chunks.shape[1]
    height = _height(chunks[0])
    for start in range(0, N, height):
        stop = min(start + height, N)
        tiles = torch.bmm(chunks[:, start:stop], chunks[:, start:].mT).sum(0, dtype=torch.float64)
        total[start:stop, start:] += tiles
        if stop < N:
            total[stop:, start:stop] += tiles[:, stop - start :].T


def _height(vectors: Tensor) -> int:
    """The number of rows of a tile of the Gram of `vectors` (N, P)."""
    N = len(vectors)
    few = [height for below, height in _SMALL_TILES if below > N and vectors.device.type == "cpu"]
    return few[0] if few else max(_LEAST_TILE, N // 4)


def coefficients(basis: Tensor, x: Tensor) -> Tensor:
    """`basis @ x` for `basis` (m, P) and `x` (P,), as an (m,) float64 tensor on their device."""
    step = max(_step(x), _BASIS_CHUNK)
    total = (basis[:, :step] @ x[:step]).to(torch.float64)
    for start in range(step, len(x), step):
        part = slice(start, start + step)
        total += basis[:, part] @ x[part]
    return total


def subtract_combination(x: Tensor, basis: Tensor, weights: Tensor) -> None:
    """`x -= basis.T @ weights` in place, for `basis` (m, P), `weights` (m,) and `x` (P,); every entry is a sum of m terms."""
    x.addmv_(basis.T, weights.to(x.dtype), alpha=-1.0)


def _step(tensor: Tensor) -> int:
    return _CPU_CHUNK if tensor.device.type == "cpu" else _ACCELERATOR_CHUNK


def finite_samples(grams: Mapping[str, Tensor]) -> Tensor:
    """(S,) on CPU: whether a sample's gradient is finite in every one of `grams`."""
    return torch.stack([K.diagonal().cpu() for K in grams.values()]).isfinite().all(0)
