"""Factored Grams: from inner products of inputs and of output gradients, without any per-sample gradient."""

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor
from torch.nn.functional import pad

from curvature_callbacks.gram.products.limits import PRODUCT_LIMITS, ProductLimits
from curvature_callbacks.gram.products.pixel_pairs import pair_gram, pairs_are_cheaper
from curvature_callbacks.gram.products.scratch import Scratch
from curvature_callbacks.gram.uses.convolution import Convolution
from curvature_callbacks.gram.uses.uses import OuterProduct, Use

_Factors = tuple[list[Tensor], list[Tensor]]


def factored_gram(
    uses: Sequence[Sequence[Use]], sizes: Sequence[int], scratch: Scratch, limits: ProductLimits = PRODUCT_LIMITS
) -> Tensor | None:
    """`K_ij = sum_{t,s} (a_it . a_js)(b_it . b_js)`, (S, S) float64, where that is cheaper than gradients; else None.

    Args:
        uses: for each pass those of one parameter; one a pass is what this form can do.
        sizes: samples of each pass.
        scratch: remembers products.
        limits: how many pairs may be held.

    Cost: `2 N^2 T^2 (d_in + d_out)` operations; for convolutions see `pair_gram`.
    """
    if any(len(of_pass) > 1 for of_pass in uses):
        return None
    products = [use for of_pass in uses for use in of_pass if _is_product(use)]
    if len(products) == sum(map(len, uses)):
        factors = _cheap_factors(products, uses, sizes, limits.position_pairs)
        return None if factors is None else _inner_products(*factors, scratch)
    kernels = [use for of_pass in uses for use in of_pass if isinstance(use, Convolution)]
    if len(kernels) < len(uses) or not pairs_are_cheaper(kernels, limits):
        return None
    return pair_gram(kernels, limits)


def _is_product(use: Use) -> TypeGuard[OuterProduct | Convolution]:
    return isinstance(use, OuterProduct) or (isinstance(use, Convolution) and use.is_product)


def _cheap_factors(
    products: Sequence[OuterProduct | Convolution], uses: Sequence[Sequence[Use]], sizes: Sequence[int], most_pairs: int
) -> _Factors | None:
    """`(left (n, T, d1), right (n, T, d2))` of every pass, in two lists."""
    N = sum(sizes)
    left, right = products[0].factors()
    T, d1, d2 = left.shape[1], left.shape[2], right.shape[2]
    if T * T * (d1 + d2) >= d1 * d2 * (1 + T / N) or most_pairs < (N * T) ** 2:
        return None
    rest = iter(products)
    pairs = [next(rest).factors() if used else _nothing(size, d1, d2, left) for used, size in zip(uses, sizes, strict=True)]
    T = max(left.shape[1] for left, _ in pairs)
    if most_pairs < (N * T) ** 2:
        return None
    return [_with_positions(a, T) for a, _ in pairs], [_with_positions(b, T) for _, b in pairs]


def _nothing(size: int, d1: int, d2: int, example: Tensor) -> tuple[Tensor, Tensor]:
    return example.new_zeros(size, 1, d1), example.new_zeros(size, 1, d2)


def _with_positions(factor: Tensor, T: int) -> Tensor:
    """`factor` with zeros after its positions, up to `T` of them; they add nothing."""
    missing = T - factor.shape[1]
    return pad(factor, (0, 0, 0, missing)) if missing else factor


def _inner_products(lefts: Sequence[Tensor], rights: Sequence[Tensor], scratch: Scratch) -> Tensor:
    N, T = sum(map(len, lefts)), lefts[0].shape[1]
    pairs = [scratch.gram([factor.flatten(0, 1) for factor in factors]) for factors in (rights, lefts)]
    products = pairs[0] * pairs[1]  # (N T, N T)
    return products if T == 1 else products.reshape(N, T, N, T).sum((1, 3))
