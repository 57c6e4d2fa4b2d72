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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.gram.kronecker.positions import (
    CHUNK_BYTES,
    HasLayerVectors,
    MicrobatchUses,
    Positions,
    SecondMoment,
    pieces,
)
from curvature_callbacks.gram.uses.uses import Lookup, Use
from curvature_callbacks.linalg.kronecker import Factor, KroneckerFactors, factor_of_diagonal
from curvature_callbacks.model.loss.sharing import Sharing


def kronecker_factors(
    microbatches: Sequence[MicrobatchUses], *, bias: bool, sharing: Sharing, device: torch.device | None = None
) -> KroneckerFactors | None:
    """Factors `A x G` of one layer's Fisher block and EKFAC's eigenvalues `(1/Z) sum_s (U_G' g_s U_A)^2`.

    Formulas and conventions: see the module. A layer used several times in a pass has the positions of all uses. For an
    embedding A is diagonal, over the rows looked up (in `reduce` its off-diagonal part is dropped); V x V is never formed.
    Sums are float64 over products in the data's dtype; where a factor has fewer rows than columns (the output gradients of a
    vocabulary) it is decomposed from its rows, and d x d is not formed either.

    Args:
        microbatches: every microbatch, with uses that `factor_obstacle` accepts.
        bias: whether the operation adds a trained bias.
        sharing: `expand` or `reduce`.
        device: where to compute (uses may wait elsewhere); default where the first use is.

    Returns:
        The factors; None where no pass used the weight.

    Cost: for n = N T positions `2 n (d_in^2 + d_out^2)` operations (n^2 (d_in + d_out) for rows of fewer than d), the same
    again for the rotation, `2 n d_in d_out` for the gradients, all a pass, and two eigensolves. Memory: 128 MiB, and
    d_in^2 + d_out^2 + d_in d_out numbers in float64.

    References: Martens and Grosse (2015); George et al. (2018), "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis"; Eschenhagen et al. (2023), "Kronecker-factored approximate curvature for modern neural
    network architectures".
    """
    first = next((use for batch in microbatches for uses in batch.passes for use in uses), None)
    if first is None:
        return None
    assert first.gradient is not None
    device = device or first.gradient.device
    normaliser = sum(batch.counts.sum().item() for batch in microbatches)
    if isinstance(first, Lookup):
        return lookup_factors(microbatches, normaliser=normaliser, sharing=sharing, device=device)
    A, G, mass = SecondMoment(), SecondMoment(), 0.0
    for piece in pieces(microbatches, _layer_vectors, bias=bias, device=device):
        A.add(piece.weighted_inputs(sharing))
        G.add(piece.gradients(sharing))
        mass += piece.mass(sharing)
    factors = KroneckerFactors(A=A.factor(normaliser), G=G.factor(mass))
    corrected = _squares(factors, pieces(microbatches, _layer_vectors, bias=bias, device=device)) / normaliser
    return replace(factors, corrected=corrected)


def _layer_vectors(use: Use) -> tuple[Tensor, Tensor]:
    assert isinstance(use, HasLayerVectors)
    return use.layer_vectors()


def _squares(factors: KroneckerFactors, found: Iterator[Positions]) -> Tensor:
    """`sum_s (U_G' g_s U_A)^2`, (r_G, r_A) float64; per-sample gradients in pieces of 64 MiB."""
    A, G = factors.A, factors.G
    total = torch.zeros(len(G.eigenvalues), len(A.eigenvalues), dtype=torch.float64, device=A.eigenvalues.device)
    for piece in found:
        for outputs in piece.outputs:
            if _gradients_are_smaller(piece.inputs, outputs):
                _add_rotated_gradients(total, factors, piece.inputs, outputs)
            else:
                _add_products(total, G.rotated(outputs), A.rotated(piece.inputs))
    return total


def _gradients_are_smaller(inputs: Tensor, outputs: Tensor) -> bool:
    """Whether rotating a sample's gradient takes fewer operations than rotating its positions (convolutions)."""
    T, d_in, d_out = inputs.shape[1], inputs.shape[2], outputs.shape[2]
    fits = d_in * d_out * inputs.element_size() <= CHUNK_BYTES
    return fits and d_in * d_out * (d_in + d_out) < T * (d_in**2 + d_out**2)


def _add_rotated_gradients(total: Tensor, factors: KroneckerFactors, inputs: Tensor, outputs: Tensor) -> None:
    size = inputs.shape[2] * outputs.shape[2] * inputs.element_size()
    step = max(1, CHUNK_BYTES // size)
    for a, b in zip(torch.split(inputs, step), torch.split(outputs, step), strict=True):
        gradients = factors.A.rotated(b.mT @ a)  # (n, d_out, r_A)
        total += factors.G.rotated(gradients.mT).mT.square().sum(0, dtype=torch.float64)


def _add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`sum_s (left_s' right_s)^2` of `left` (n, T, r_G) and `right` (n, T, r_A)."""
    if left.shape[1] == 1:  # the square of a product is the product of squares
        total += left[:, 0].double().square().T @ right[:, 0].double().square()
        return
    step = max(1, CHUNK_BYTES // max(len(right) * right.shape[2] * right.element_size(), 1))
    for start in range(0, left.shape[2], step):
        gradients = left[:, :, start : start + step].mT @ right
        total[start : start + step] += gradients.square_().sum(0, dtype=torch.float64)


def lookup_factors(
    microbatches: Sequence[MicrobatchUses], *, normaliser: float, sharing: Sharing, device: torch.device
) -> KroneckerFactors:
    """The factors and EKFAC's eigenvalues of an embedding, whose input a_it is the unit vector of the index.

    `expand`: `A_vv = (1/Z) sum_i c_i #{t: index v}`, all there is to A. `reduce`:
    `A_vv = (1/Z) sum_i c_i (share of v in i)^2`, its diagonal. `A.axes` are rows of the table.

    Cost: `2 n d^2` operations for n positions a pass, and one d x d eigensolve. Memory: 128 MiB and V' d numbers in float64
    for the V' rows looked up.
    """
    support = torch.unique(torch.cat([use.present_rows().to(device) for use in _lookups(microbatches)]))

    def extract(use: Use) -> tuple[Tensor, Tensor]:
        assert isinstance(use, Lookup)
        assert use.gradient is not None
        places = use.on(support.to(use.indices.device)).indices[..., None]  # (N, T, 1), -1 where the row receives no gradient
        return places, use.gradient.masked_fill(places < 0, 0.0)

    diagonal = torch.zeros(len(support), dtype=torch.float64, device=device)
    G, mass = SecondMoment(), 0.0
    for piece in pieces(microbatches, extract, bias=False, device=device):
        diagonal += _diagonal(_entries(piece, len(support)), piece, sharing, len(support))
        G.add(piece.gradients(sharing))
        mass += piece.mass(sharing)
    factors = KroneckerFactors(A=factor_of_diagonal(diagonal / normaliser), G=G.factor(mass))
    total = torch.zeros(len(support), len(factors.G.eigenvalues), dtype=torch.float64, device=diagonal.device)
    for piece in pieces(microbatches, extract, bias=False, device=device):
        _add_squares(total, _entries(piece, len(support)), piece, factors.G)
    axes = factors.A.axes
    assert axes is not None
    A = replace(factors.A, axes=support[axes])
    return KroneckerFactors(A=A, G=factors.G, corrected=total[axes].T / normaliser)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """The pairs of a row and an index in it, each once.

    Attributes:
        rows: (E,) row of the pair.
        places: (E,) index.
        counts: (E,) float64, live positions of the pair.
        owner: (m,) the pair each live position belongs to.
    """

    rows: Tensor
    places: Tensor
    counts: Tensor
    owner: Tensor


def _entries(piece: Positions, size: int) -> _Entries:
    rows = torch.arange(len(piece.inputs), device=piece.live.device)[:, None]
    keys = (rows * size + piece.inputs[..., 0])[piece.live]
    pairs, owner, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    return _Entries(pairs // size, pairs % size, counts.double(), owner)


def _diagonal(entries: _Entries, piece: Positions, sharing: Sharing, size: int) -> Tensor:
    values = entries.counts
    if sharing == "reduce":
        values = (values / piece.num_live()[entries.rows]).square()
    total = torch.zeros(size, dtype=torch.float64, device=values.device)
    return total.index_add_(0, entries.places, values * piece.counts[entries.rows])


def _add_squares(total: Tensor, entries: _Entries, piece: Positions, G: Factor) -> None:
    """`total` (V', r) gets the squares of the rotated gradients, which are zero but for the pairs."""
    for outputs in piece.outputs:
        rotated = G.rotated(outputs[piece.live]).double()  # (m, r)
        gradients = rotated.new_zeros(len(entries.places), rotated.shape[1]).index_add_(0, entries.owner, rotated)
        total.index_add_(0, entries.places, gradients.square_())


def _lookups(microbatches: Sequence[MicrobatchUses]) -> list[Lookup]:
    found = [use for batch in microbatches for uses in batch.passes for use in uses]
    assert all(isinstance(use, Lookup) for use in found)
    return [use for use in found if isinstance(use, Lookup)]
