"""Ritz pairs of a Krylov basis: which are wanted, how good they are, and which are only ghosts of others."""

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.linalg.eigenpairs import NOISE, noise_floor
from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.wanted import Wanted

_INDEPENDENT: Final = 0.1  # least part of a unit Ritz vector outside those before it; a ghost's was below 1e-3

_GROUP_WIDTH: Final = 1e3  # noise floors that two values of one group may be apart

_COPIES: Final = 8  # of a wanted pair that are looked at, on average; a bulk at zero is no group of ghosts


@final
@dataclass(frozen=True, slots=True, eq=False)
class Ritz:
    """The wanted Ritz pairs of one look.

    Attributes:
        values: (k,) float64, descending.
        coordinates: (m, k) in the Krylov basis.
        residuals: (k,) `||A v - theta v||`, estimated.
        scale: largest `|theta|`, of all.
        floor: noise floor of a residual.
    """

    values: Tensor
    coordinates: Tensor
    residuals: Tensor
    scale: float
    floor: float

    def converged(self, tol: float) -> Tensor:
        """(k,) bool: each by its own size, zeros by the floor."""
        return self.residuals <= (tol * self.values.abs()).clamp_min(self.floor)


def ritz_pairs(krylov: Krylov, wanted: Wanted) -> Ritz:
    """The wanted pairs of a basis that is orthonormal, at least to `sqrt(eps)`. Cost: an m x m eigensolve on the CPU."""
    values, vectors = torch.linalg.eigh(krylov.projection.matrix())
    removed = krylov.removed()
    if removed is None:
        return _chosen(krylov, values, vectors, wanted.choose(values))
    coordinates, errors = _refined(values, vectors, removed, krylov.eps)
    return _chosen(krylov, values, coordinates, wanted.choose(values), errors)


def _refined(values: Tensor, vectors: Tensor, removed: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors of `H + C` to first order in C, (m, m) columns, and the norms (m,) of what they leave of it.

    Where a basis is orthonormal to `sqrt(eps)` the eigenvalues of H are good to eps (Simon 1984, theorem 5), but its
    eigenvectors only to `sqrt(eps)`: with C of that size, what is left after one step of perturbation theory is of size eps.

    With `H s_j = theta_j s_j` and `S = V' C V`, eigenvector j of `H + C` is `s_j + sum_i s_i S_ij / (theta_j - theta_i)`. C
    is not symmetric, so neither are these weights: their antisymmetric part is a rotation, which keeps lengths up to second
    order; their symmetric part is not, and is held to `sqrt(eps)`. Pairs that C couples no more than rounding does, or whose
    values are too close for first order, are left as they are.

    Args:
        values: (m,) eigenvalues of H.
        vectors: (m, m) its eigenvectors, V.
        removed: (m, m) C.
        eps: of the basis's dtype.
    """
    coupling = vectors.T @ removed @ vectors
    size = torch.maximum(coupling.abs(), coupling.T.abs())
    gaps = values[None, :] - values[:, None]
    mixed = (size > eps * values.abs().max()) & (size < eps**0.125 * gaps.abs())
    weights = torch.where(mixed, coupling / torch.where(mixed, gaps, 1.0), 0.0)
    stretch = (weights + weights.T) / 2
    turn = (weights - weights.T) / 2
    turn = turn + turn @ turn / 2  # what is left of I + turn once its columns are of unit length, to fourth order
    better = vectors + vectors @ (turn + stretch.clamp(-(eps**0.5), eps**0.5))
    better = better / better.norm(dim=0)
    product = vectors @ (values[:, None] * (vectors.T @ better)) + removed @ better
    return better, (product - better * values).norm(dim=0)


def distinct_pairs(krylov: Krylov, wanted: Wanted, tol: float, *, final: bool) -> Ritz:
    """The wanted pairs of a basis that is not orthonormal, without ghosts.

    Where orthogonality is lost the recurrence finds a converged pair again: its value then stands in H several times, each
    with a residual estimate that looks converged. But `A Q = Q H + beta q e'` holds to rounding all the same, so
    `||A y - theta y|| / ||y||` with `y = Q s` is a true bound, and a ghost's y is a multiple of an accepted one (or of no
    length). Pairs are accepted one by one, the best first, by the part of y that is independent of accepted ones of nearly
    the same value. Where ghosts leave too few, further groups of equal values are looked at.

    Args:
        krylov: the basis.
        wanted: pairs.
        tol: of the estimates below which it is worth looking at the vectors.
        final: whether to look at them in any case.

    Cost: an m x m eigensolve, and where the estimates have converged two products of the basis with the candidates.
    """
    values, vectors = torch.linalg.eigh(krylov.projection.matrix())
    spare = 0  # groups of equal values beyond the wanted ones
    while True:
        indices = _candidates(values, wanted.more(spare), krylov)
        candidates = _chosen(krylov, values, vectors, indices)
        if not final and not _best_of_groups(candidates, wanted).converged(tol).all():
            return candidates
        independent = _independent(krylov, candidates, wanted)
        absent = wanted.count - len(independent.values)
        if absent == 0 or len(indices) == len(values) or (spare > 0 and not final):
            return independent
        spare = 2 * max(spare, absent)


def _chosen(krylov: Krylov, values: Tensor, vectors: Tensor, indices: Tensor, errors: Tensor | None = None) -> Ritz:
    """The pairs at these indices, with what each leaves along the next vector, in C (`errors`) and by new segments."""
    scale = values.abs().max().item()
    floor = noise_floor(krylov.basis.dtype, scale)
    coordinates = vectors[:, indices]
    residuals = (krylov.last_beta() * coordinates[-1]).abs()
    if errors is not None:
        residuals = torch.hypot(residuals, errors[indices])
    residuals = (residuals + krylov.projection.cut_off(coordinates)).clamp_min(floor)
    return Ritz(values[indices], coordinates, residuals, scale, floor)


def _candidates(values: Tensor, wanted: Wanted, krylov: Krylov) -> Tensor:
    """Indices among ascending `values`, descending, with all copies of the wanted ones of each end."""
    radius = _GROUP_WIDTH * NOISE * krylov.eps * values.abs().max().item()
    if wanted.by_magnitude:
        order = values.abs().argsort(descending=True, stable=True)
        return order[: _reach(values.abs()[order], 2 * wanted.upper, radius)].sort().values.flip(0)
    upper = _reach(values.flip(0), wanted.upper, radius)
    lower = _reach(values, wanted.lower, radius)
    return Wanted(upper, min(lower, len(values) - upper)).choose(values)


def _reach(values: Tensor, groups: int, radius: float) -> int:
    """How many of `values`, in order, make up so many groups of equal ones; of large groups not all."""
    group = torch.cat([torch.ones(1, dtype=torch.bool), values.diff().abs() > radius]).cumsum(0)
    return min(int((group <= groups).sum()), _COPIES * groups)


def _best_of_groups(ritz: Ritz, wanted: Wanted) -> Ritz:
    """The wanted ones among the best estimates of every group of equal values."""
    radius = _GROUP_WIDTH * ritz.floor
    best: list[int] = []
    for i in range(len(ritz.values)):
        if best and (ritz.values[best[-1]] - ritz.values[i]).abs() <= radius:
            best[-1] = i if ritz.residuals[i] < ritz.residuals[best[-1]] else best[-1]
        else:
            best.append(i)
    return _subset(ritz, torch.tensor(best), wanted)


def _subset(ritz: Ritz, indices: Tensor, wanted: Wanted) -> Ritz:
    """The wanted ones among the pairs at these indices."""
    ascending = indices[ritz.values[indices].argsort()]
    chosen = ascending[wanted.choose(ritz.values[ascending])]
    return Ritz(ritz.values[chosen], ritz.coordinates[:, chosen], ritz.residuals[chosen], ritz.scale, ritz.floor)


def _independent(krylov: Krylov, candidates: Ritz, wanted: Wanted) -> Ritz:
    """The wanted ones among the candidates whose vectors are independent, orthonormal and with true residuals.

    Gram-Schmidt in the coordinates of the candidates, the one of the smallest residual first, so that only their Gram has to be
    made of long vectors. What is taken from a vector brings its residual along, so residuals add up.
    """
    vectors = krylov.vectors(candidates.coordinates)  # (P, c)
    gram = krylov.products.gram(vectors.T.contiguous()).cpu()
    errors = _true_errors(krylov, candidates.coordinates)
    lengths = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    weights = torch.zeros_like(gram)  # columns: the accepted vectors in terms of the candidates
    rounding = krylov.eps * candidates.scale * krylov.size**0.5  # of the relation; where y is short it is all there is
    residuals = ((errors + rounding) / lengths).clamp_min(candidates.floor)
    accepted: list[int] = []
    for i in residuals.argsort().tolist():
        z = torch.zeros(len(gram), dtype=torch.float64)
        z[i] = 1 / lengths[i]
        bound = residuals[i].clone()
        before = torch.tensor(accepted, dtype=torch.int64)
        near = before[(candidates.values[before] - candidates.values[i]).abs() <= 2 * (residuals[before] + residuals[i])]
        for _ in range(2):
            shares = weights[:, near].T @ (gram @ z)
            z -= weights[:, near] @ shares
            bound += shares.abs() @ residuals[near]
        length = (z @ gram @ z).clamp_min(0.0).sqrt()
        if length > _INDEPENDENT:
            weights[:, i] = z / length
            residuals[i] = bound / length
            accepted.append(i)
    independent = Ritz(candidates.values, candidates.coordinates @ weights, residuals, candidates.scale, candidates.floor)
    return _subset(independent, torch.tensor(accepted, dtype=torch.int64), wanted)


def _true_errors(krylov: Krylov, coordinates: Tensor) -> Tensor:
    """(c,) `||A Q s - theta Q s||` with what passes removed: the basis is not orthonormal, so as vectors."""
    last = krylov.last_beta() * coordinates[-1]
    removed = krylov.projection.removed() @ coordinates
    if not removed.any():
        return last.abs()
    errors = krylov.vectors(removed) + krylov.basis[krylov.size][:, None] * last.to(krylov.basis)
    return torch.stack([krylov.products.norm(column.contiguous()).cpu() for column in errors.T])
