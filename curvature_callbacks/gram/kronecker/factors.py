"""Kronecker factors of a layer from the completed uses of its weight: K-FAC and EKFAC in the same pass as the Gram.

`g_s = sum_t b_st a_t'` (d_out, d_in) is the gradient of pseudo-sample s's *summed* loss over the layer's positions t, with
a_t the input, extended by a last coordinate 1 where the layer has a bias, and b_st the gradient of its output. The layer's
Fisher block is `F = (1/Z) sum_s g_s g_s'`, and `A x G` approximates it (Eschenhagen et al. 2023), with c_i the pseudo-samples
row i stands for, `Z = sum_i c_i`, and T_i its positions:

    expand   A = (1/Z) sum_it c_i a_it a_it'   G = (1 / sum_i c_i T_i) sum_st b_st b_st'
    reduce   A = (1/Z) sum_i c_i a_i a_i'      G = (1/Z) sum_s b_s b_s'      a_i = mean_t a_it,  b_s = sum_t b_st

A row's input is the same in every backward pass over it (draws of labels, classes of an exact Fisher), so A takes it once,
with the weight c_i; the weights of the passes are inside b.

*A position counts where its output gradient differs from zero* in one of the passes (a row, in `reduce`, where one of its
positions does): padding and positions no loss depends on change nothing, as everywhere in this package. K-FAC elsewhere
averages over them too.

Both are exact for one row with one position, and at one position a row for deep linear networks with squared loss and the exact
Fisher (its output gradients do not depend on its inputs). At more positions `reduce` is exact for one row whose positions have
all the same input, or all the same output gradient (a mean over positions follows), and `expand` where every input meets every
output gradient and no pair of positions shares a pass. They are equal for one position a row. Where the output gradients of a
row cancel (the keys of attention: a shift of all changes nothing), G is rounding in `reduce`, and so is what follows from it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from curvature_callbacks.gram.kronecker.corrected import squared_coordinates
from curvature_callbacks.gram.kronecker.lookup_factors import lookup_factors
from curvature_callbacks.gram.kronecker.positions import (
    CHUNK_BYTES,
    HasLayerVectors,
    MicrobatchUses,
    Positions,
    SecondMoment,
    normaliser_of,
    pieces,
)
from curvature_callbacks.gram.uses.uses import Lookup, Use
from curvature_callbacks.linalg.kronecker import KroneckerFactors
from curvature_callbacks.model.loss.sharing import Sharing


def kronecker_factors(
    microbatches: Sequence[MicrobatchUses],
    *,
    bias: bool,
    sharing: Sharing,
    device: torch.device | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> KroneckerFactors | None:
    """Factors `A x G` of one layer's Fisher block and EKFAC's eigenvalues `(1/Z) sum_s (U_G' g_s U_A)^2`.

    Formulas and conventions: see the module. A layer used several times in a pass has the positions of all uses. For an
    embedding A is diagonal, over the indices looked up (in `reduce` its off-diagonal part is dropped); V x V is never formed.
    Sums are float64 over products in the data's dtype; where a factor is the sum of fewer than d products (the output
    gradients of a vocabulary) it is decomposed from these vectors, and d x d is not formed either.

    Args:
        microbatches: every microbatch, with uses that `factor_obstacle` accepts.
        bias: whether the operation adds a trained bias.
        sharing: `expand` or `reduce`.
        device: where to compute (uses may wait elsewhere); default where the first use is.
        chunk_bytes: of positions copied, and of per-sample gradients, at a time.

    Returns:
        The factors; None where no pass used the weight.

    Cost: for n = N T positions `2 n (d_in^2 + d_out^2)` operations (n^2 (d_in + d_out) where n < d), the same
    again for the rotation, `2 n d_in d_out` for the gradients, all a pass, and two eigensolves. Memory: 128 MiB, and
    d_in^2 + d_out^2 + d_in d_out numbers in float64.

    References: Martens and Grosse (2015); George et al. (2018), "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis"; Eschenhagen et al. (2023), "Kronecker-factored approximate curvature for modern neural
    network architectures".
    """
    first = next((use for batch in microbatches for uses in batch.passes for use in uses), None)
    if first is None:
        return None
    device = device or first.tensors()[0].device
    if isinstance(first, Lookup):
        return lookup_factors(microbatches, sharing=sharing, device=device, chunk_bytes=chunk_bytes)
    in_pieces = partial(pieces, microbatches, _layer_vectors, bias=bias, device=device, chunk_bytes=chunk_bytes)
    return _factors_of(in_pieces, normaliser_of(microbatches), sharing, chunk_bytes)


def _factors_of(
    in_pieces: Callable[[], Iterator[Positions]], normaliser: float, sharing: Sharing, chunk_bytes: int
) -> KroneckerFactors:
    A, G, mass = SecondMoment(), SecondMoment(), 0.0
    for piece in in_pieces():
        A.add(piece.weighted_inputs(sharing))
        G.add(piece.gradients(sharing))
        mass += piece.mass(sharing)
    factors = KroneckerFactors(A=A.factor(normaliser), G=G.factor(mass))
    return replace(factors, corrected=squared_coordinates(factors, in_pieces(), chunk_bytes) / normaliser)


def _layer_vectors(use: Use) -> tuple[Tensor, Tensor]:
    assert isinstance(use, HasLayerVectors)
    return use.layer_vectors()
