"""Kronecker factors of an embedding, whose input is the unit vector of the index: A is diagonal."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.gram.kronecker.positions import MicrobatchUses, Positions, SecondMoment, normaliser_of, pieces
from curvature_callbacks.gram.uses.uses import Lookup, Use
from curvature_callbacks.linalg.kronecker import Factor, KroneckerFactors, factor_of_diagonal
from curvature_callbacks.model.loss.sharing import Sharing


def lookup_factors(
    microbatches: Sequence[MicrobatchUses], *, sharing: Sharing, device: torch.device, chunk_bytes: int
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

    normaliser = normaliser_of(microbatches)
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
