"""The Gram of one parameter's per-sample gradients from its uses, never holding all of them."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvature_callbacks.gram.uses import Lookup, OuterProduct, Use
from curvature_callbacks.linalg.accumulate import gram

_CHUNK_BYTES: Final = 64 << 20  # per-sample gradients materialised at a time
_PAIRS: Final = 1 << 24  # most position pairs the factored form may hold: 128 MiB in float64


def parameter_gram(uses: Sequence[Sequence[Use]], sizes: Sequence[int], shape: torch.Size) -> Tensor:
    """`K_ij = g_i . g_j` over all microbatches, (N, N) float64.

    The uses of one parameter (tied, shared) are added up before the product, so cross terms are exact. Materialised in chunks
    of rows: `2 N T d_in d_out + 2 N^2 d_in d_out` operations; factored, `K_ij = sum_{t,s} (a_it . a_js)(b_it . b_js)`:
    `2 N^2 T^2 (d_in + d_out)`; the cheaper is taken.

    Args:
        uses: for each microbatch the completed uses of the parameter; an empty list means zero gradients.
        sizes: rows of each microbatch.
        shape: the parameter's shape.

    Cost: as above; extra memory 64 MiB of gradients, or 128 MiB of position pairs.
    """
    if not any(uses):
        return torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    factors = _cheap_factors(uses)
    if factors is not None:
        left, right = factors
        return _factored(left, right)
    num_rows = shape[0] if shape else 1
    if all(isinstance(use, Lookup) for found in uses for use in found):
        uses, num_rows = _on_present_rows(uses)
    return _materialised(uses, sizes, num_rows, torch.Size(shape[1:]))


def _materialised(uses: Sequence[Sequence[Use]], sizes: Sequence[int], num_rows: int, row: torch.Size) -> Tensor:
    N, example = sum(sizes), _gradient(uses)
    total = torch.zeros(N, N, dtype=torch.float64, device=example.device)
    step = max(1, _CHUNK_BYTES // (N * max(row.numel(), 1) * example.element_size()))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        rows = [_sum_of_rows(found, start, stop, size, row, example) for found, size in zip(uses, sizes, strict=True)]
        total += gram(rows[0] if len(rows) == 1 else torch.cat(rows))
    return total


def _sum_of_rows(uses: Sequence[Use], start: int, stop: int, size: int, row: torch.Size, example: Tensor) -> Tensor:
    """(size, (stop - start) * row) per-sample gradients of one microbatch."""
    if not uses:
        return example.new_zeros(size, (stop - start) * row.numel())
    total = uses[0].rows(start, stop)
    for use in uses[1:]:
        use.add_rows(total, start, stop)
    return total.reshape(size, -1)


def _cheap_factors(uses: Sequence[Sequence[Use]]) -> tuple[Tensor, Tensor] | None:
    """`(left (N, T, d1), right (N, T, d2))` of a single matrix product where the factored form is cheaper."""
    products = [use for found in uses for use in found if isinstance(use, OuterProduct)]
    if any(len(found) != 1 for found in uses) or len(products) != len(uses):
        return None
    pairs = [product.factors() for product in products]
    N = sum(len(left) for left, _ in pairs)
    T = max(left.shape[1] for left, _ in pairs)
    d1, d2 = pairs[0][0].shape[2], pairs[0][1].shape[2]
    if T * T * (d1 + d2) >= d1 * d2 * (1 + T / N) or (N * T) ** 2 > _PAIRS:
        return None
    return _stack([left for left, _ in pairs], T), _stack([right for _, right in pairs], T)


def _stack(factors: Sequence[Tensor], T: int) -> Tensor:
    """Microbatches of different length side by side: zero positions add nothing."""
    return torch.cat([pad(factor, (0, 0, 0, T - factor.shape[1])) for factor in factors])


def _factored(left: Tensor, right: Tensor) -> Tensor:
    N, T, _ = left.shape
    products = gram(left.flatten(0, 1)) * gram(right.flatten(0, 1))  # (N T, N T)
    return products.reshape(N, T, N, T).sum((1, 3))


def _on_present_rows(uses: Sequence[Sequence[Use]]) -> tuple[list[list[Lookup]], int]:
    """The same uses of a table that holds only the rows looked up: a V x d matrix per sample is never formed."""
    lookups = [[use for use in found if isinstance(use, Lookup)] for found in uses]
    present: Tensor = torch.unique(torch.cat([use.present_rows() for found in lookups for use in found]))
    return [[_relabelled(use, present) for use in found] for found in lookups], len(present)


def _relabelled(use: Lookup, present: Tensor) -> Lookup:
    place = torch.searchsorted(present, use.indices.contiguous()).clamp_max(max(len(present) - 1, 0))
    known = present[place] == use.indices if len(present) else torch.zeros_like(use.indices, dtype=torch.bool)
    return use.relabelled(torch.where(known, place, -1))


def _gradient(uses: Sequence[Sequence[Use]]) -> Tensor:
    gradient = next(use for found in uses for use in found).gradient
    assert gradient is not None
    return gradient
