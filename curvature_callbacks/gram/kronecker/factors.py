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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.gram.kronecker.corrected import squared_coordinates
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
    microbatches: Sequence[MicrobatchUses],
    *,
    bias: bool,
    sharing: Sharing,
    device: torch.device | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> KroneckerFactors | None:
    """Factors `A x G` of one layer's Fisher block and EKFAC's eigenvalues `(1/Z) sum_s (U_G' g_s U_A)^2`.

    Formulas and conventions: see the module. A layer used several times in a pass has the positions of all uses. For an
    embedding A is diagonal, over the rows looked up (in `reduce` its off-diagonal part is dropped); V x V is never formed.
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
        return lookup_factors(microbatches, normaliser=normaliser, sharing=sharing, device=device, chunk_bytes=chunk_bytes)
    A, G, mass = SecondMoment(), SecondMoment(), 0.0
    in_pieces = partial(pieces, microbatches, _layer_vectors, bias=bias, device=device, chunk_bytes=chunk_bytes)
    for piece in in_pieces():
        A.add(piece.weighted_inputs(sharing))
        G.add(piece.gradients(sharing))
        mass += piece.mass(sharing)
    factors = KroneckerFactors(A=A.factor(normaliser), G=G.factor(mass))
    return replace(factors, corrected=squared_coordinates(factors, in_pieces(), chunk_bytes) / normaliser)


def _layer_vectors(use: Use) -> tuple[Tensor, Tensor]:
    assert isinstance(use, HasLayerVectors)
    return use.layer_vectors()


def lookup_factors(
    microbatches: Sequence[MicrobatchUses], *, normaliser: float, sharing: Sharing, device: torch.device, chunk_bytes: int
) -> KroneckerFactors:
    """The factors and EKFAC's eigenvalues of an embedding, whose input a_it is the unit vector of the index.

    `expand`: `A_vv = (1/Z) sum_i c_i #{t: index v}`, all there is to A. `reduce`:
    `A_vv = (1/Z) sum_i c_i (share of v in i)^2`, its diagonal. `A.axes` are indices of the table.

    Cost: `2 n d^2` operations for n positions a pass, and one d x d eigensolve. Memory: 128 MiB and V' d numbers in float64
    for the V' indices looked up.
    """
    support = torch.unique(torch.cat([use.present().to(device) for use in _lookups(microbatches)]))

    def extract(use: Use) -> tuple[Tensor, Tensor]:
        assert isinstance(use, Lookup)
        assert use.gradient is not None
        indices = use.restricted(support.to(use.indices.device)).indices[..., None]  # (N, T, 1), -1 where there is no gradient
        return indices, use.gradient.masked_fill(indices < 0, 0.0)

    in_pieces = partial(pieces, microbatches, extract, bias=False, device=device, chunk_bytes=chunk_bytes)

    diagonal = torch.zeros(len(support), dtype=torch.float64, device=device)
    G, mass = SecondMoment(), 0.0
    for piece in in_pieces():
        diagonal += _diagonal(_entries(piece, len(support)), piece, sharing, len(support))
        G.add(piece.gradients(sharing))
        mass += piece.mass(sharing)
    factors = KroneckerFactors(A=factor_of_diagonal(diagonal / normaliser), G=G.factor(mass))
    total = torch.zeros(len(support), len(factors.G.eigenvalues), dtype=torch.float64, device=diagonal.device)
    for piece in in_pieces():
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
        indices: (E,) index of the pair, among those looked up.
        counts: (E,) float64, live positions of the pair.
        owner: (m,) the pair each live position belongs to.
    """

    rows: Tensor
    indices: Tensor
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
    return total.index_add_(0, entries.indices, values * piece.counts[entries.rows])


def _add_squares(total: Tensor, entries: _Entries, piece: Positions, G: Factor) -> None:
    """`total` (V', r) gets the squares of the rotated gradients, which are zero but for the pairs."""
    for outputs in piece.outputs:
        rotated = G.rotated(outputs[piece.live]).double()  # (m, r)
        gradients = rotated.new_zeros(len(entries.indices), rotated.shape[1]).index_add_(0, entries.owner, rotated)
        total.index_add_(0, entries.indices, gradients.square_())


def _lookups(microbatches: Sequence[MicrobatchUses]) -> list[Lookup]:
    uses = [use for batch in microbatches for of_pass in batch.passes for use in of_pass]
    assert all(isinstance(use, Lookup) for use in uses)
    return [use for use in uses if isinstance(use, Lookup)]
