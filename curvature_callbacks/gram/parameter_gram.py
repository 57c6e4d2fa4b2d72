"""The Gram of one parameter's per-sample gradients from its uses, never holding all of them."""

from collections import deque
from collections.abc import Sequence
from typing import Final, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvature_callbacks.gram.convolution import Convolution
from curvature_callbacks.gram.regions import Region, regions
from curvature_callbacks.gram.sources import Placed
from curvature_callbacks.gram.uses import Dense, Lookup, OuterProduct, Use
from curvature_callbacks.linalg.accumulate import gram

_CHUNK_BYTES: Final = 16 << 20  # per-sample gradients materialised at a time: chunks below 4 MiB took up to twice the time
_CONVOLUTION_BYTES: Final = 64 << 20  # the same where a convolution has to be run for each chunk
_KEPT_ROWS: Final = 1024  # of a product that is remembered
_PAIRS: Final = 1 << 22  # most position pairs the factored form may hold: 32 MiB in float64, three of which exist at a time


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


@torch.no_grad()
def parameter_gram(
    passes: Sequence[Sequence[Placed]], sizes: Sequence[int], scratch: Scratch, *, rows: Tensor | None = None
) -> Tensor | None:
    """`K_ij = g_i . g_j` over all passes, (S, S) float64, S the samples of all of them; None where it takes too much memory.

    The uses of one parameter (tied, shared) are added up before the product, so cross terms are exact. Materialised in chunks
    of rows: `2 N T d_in d_out + 2 N^2 d_in d_out` operations; factored, `K_ij = sum_{t,s} (a_it . a_js)(b_it . b_js)`:
    `2 N^2 T^2 (d_in + d_out)`; the cheaper is taken.

    Args:
        passes: for each backward pass the completed uses of the parameter; an empty list means zero gradients.
        sizes: samples of each pass.
        scratch: memory for the chunks.
        rows: sorted rows of the parameter to count, the sum scaled up to all of them; only where it is used as a whole.

    Cost: as above; extra memory 16 MiB of gradients, or 96 MiB of position pairs.
    """
    if not any(passes):
        return torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    found = regions(passes)
    if found is None:
        return None
    if rows is not None and len(found) == 1 and found[0].whole:
        part = Region([[use.restricted(rows) for use in uses] for uses in found[0].uses], len(rows), found[0].row_size, True)
        return _region_gram(part, sizes, scratch) * (found[0].num_rows / len(rows))
    total = _region_gram(found[0], sizes, scratch)
    for region in found[1:]:
        total += _region_gram(region, sizes, scratch)
    return total


def _region_gram(region: Region, sizes: Sequence[int], scratch: Scratch) -> Tensor:
    factors = _cheap_factors(region.uses, sizes)
    if factors is not None:
        return _factored(*factors, scratch)
    only = region.uses[0][0] if len(region.uses) == 1 and len(region.uses[0]) == 1 else None
    if isinstance(only, Dense):
        return scratch.gram(only.whole()).clone()
    if all(isinstance(use, Lookup) for found in region.uses for use in found):
        return _materialised(_on_present_rows(region), sizes, scratch)
    return _materialised(region, sizes, scratch)


def _materialised(region: Region, sizes: Sequence[int], scratch: Scratch) -> Tensor:
    N, row, example = sum(sizes), region.row_size, _gradient(region.uses)
    total = torch.zeros(N, N, dtype=torch.float64, device=example.device)
    slow = any(isinstance(use, Convolution) and not use.is_product for uses in region.uses for use in uses)
    chunk = _CONVOLUTION_BYTES if slow else _CHUNK_BYTES
    step = max(1, chunk // (N * max(row, 1) * example.element_size()))
    for start in range(0, region.num_rows, step):
        stop = min(start + step, region.num_rows)
        buffer = scratch.take(N * (stop - start) * row, example).view(N, stop - start, row)
        for uses, piece in zip(region.uses, torch.split(buffer, list(sizes)), strict=True):
            _sum_of_rows(uses, start, stop, piece)
        total += gram(buffer.flatten(1))
    return total


def _sum_of_rows(uses: Sequence[Use], start: int, stop: int, out: Tensor) -> None:
    """Per-sample gradients of one pass into `out` (size, stop - start, row)."""
    if not uses:
        out.zero_()
        return
    uses[0].rows(start, stop, out)
    for use in uses[1:]:
        use.add_rows(out, start, stop)


def _cheap_factors(uses: Sequence[Sequence[Use]], sizes: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """`(left (S, T, d1), right (S, T, d2))` of a single matrix product a pass, where the factored form is cheaper."""
    products = [use for found in uses for use in found if isinstance(use, OuterProduct | Convolution) and use.is_product]
    if any(len(found) > 1 for found in uses) or len(products) != sum(map(len, uses)):
        return None
    N = sum(sizes)
    left, right = products[0].factors()
    T, d1, d2 = left.shape[1], left.shape[2], right.shape[2]
    if T * T * (d1 + d2) >= d1 * d2 * (1 + T / N) or (N * T) ** 2 > _PAIRS:
        return None
    pairs = [_factors(found, size, left, right) for found, size in zip(uses, sizes, strict=True)]
    T = max(left.shape[1] for left, _ in pairs)
    return None if (N * T) ** 2 > _PAIRS else (_stack([a for a, _ in pairs], T), _stack([b for _, b in pairs], T))


def _factors(uses: Sequence[Use], size: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    if not uses:
        return left.new_zeros(size, 1, left.shape[2]), right.new_zeros(size, 1, right.shape[2])
    use = uses[0]
    assert isinstance(use, OuterProduct | Convolution)
    return use.factors()


def _stack(factors: Sequence[Tensor], T: int) -> Tensor:
    """Passes of different length side by side: zero positions add nothing."""
    if len(factors) == 1:
        return factors[0]
    return torch.cat([pad(factor, (0, 0, 0, T - factor.shape[1])) for factor in factors])


def _factored(left: Tensor, right: Tensor, scratch: Scratch) -> Tensor:
    N, T, _ = left.shape
    products = scratch.gram(right.flatten(0, 1)) * scratch.gram(left.flatten(0, 1))  # (N T, N T)
    return products if T == 1 else products.reshape(N, T, N, T).sum((1, 3))


def _on_present_rows(region: Region) -> Region:
    """The same uses of a table that holds only the rows looked up: a V x d matrix per sample is never formed."""
    lookups = [[use for use in found if isinstance(use, Lookup)] for found in region.uses]
    present: Tensor = torch.unique(torch.cat([use.present_rows() for found in lookups for use in found]))
    present = present[present >= 0]
    return Region([[use.on(present) for use in found] for found in lookups], len(present), region.row_size, region.whole)


def _gradient(uses: Sequence[Sequence[Use]]) -> Tensor:
    gradient = next(use for found in uses for use in found).gradient
    assert gradient is not None
    return gradient
