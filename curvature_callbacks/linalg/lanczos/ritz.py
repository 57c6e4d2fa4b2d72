"""Ritz pairs of a Krylov basis: which are wanted, how good they are, and which are only ghosts of others."""

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.linalg.eigenpairs import NOISE
from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.wanted import Wanted

_INDEPENDENT: Final = 0.1  # least part of a unit Ritz vector outside those before it; a ghost's was below 1e-3

_COPIES: Final = 8  # of a wanted pair that are looked at, on average; a bulk at zero is no group of ghosts


@final
@dataclass(slots=True)
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
    values, vectors = torch.linalg.eigh(krylov.projected())
    taken = krylov.taken()
    if taken is None:
        return _chosen(krylov, values, vectors, wanted.choose(values))
    coordinates, errors = _refined(values, vectors, taken, krylov.eps)
    return _chosen(krylov, values, coordinates, wanted.choose(values), errors)


def _refined(values: Tensor, vectors: Tensor, taken: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors of `H + C` to first order in C, (m, m) columns, and the length of what they leave of it, (m,).

    Where a basis is orthonormal to `sqrt(eps)` the eigenvalues of H are good to eps (Simon 1984, theorem 5), but its
    eigenvectors only to `sqrt(eps)`: with C of that size, what is left after one step of perturbation theory is of size eps.
    """
    share = vectors.T @ taken @ vectors
    size = torch.maximum(share.abs(), share.T.abs())
    gaps = values[None, :] - values[:, None]
    apart = (size > eps * values.abs().max()) & (size < eps**0.125 * gaps.abs())
    turn = torch.where(apart, share / torch.where(apart, gaps, 1.0), 0.0)
    stretch = (turn + turn.T) / 2
    turn = (turn - turn.T) / 2
    turn = turn + turn @ turn / 2  # what is left of I + turn once its columns are of unit length, to fourth order
    better = vectors + vectors @ (turn + stretch.clamp(-(eps**0.5), eps**0.5))
    better = better / better.norm(dim=0)
    product = vectors @ (values[:, None] * (vectors.T @ better)) + taken @ better
    return better, (product - better * values).norm(dim=0)


def distinct_pairs(krylov: Krylov, wanted: Wanted, tol: float, *, final: bool, spare: int = 0) -> Ritz:
    """The wanted pairs of a basis that is not orthonormal, without ghosts.

    Where orthogonality is lost the recurrence finds a converged pair again: its value then stands in H several times, each
    with a residual estimate that looks converged. But `A Q = Q H + beta q e'` holds to rounding all the same, so
    `||A y - theta y|| / ||y||` with `y = Q s` is a true bound, and a ghost's y is a multiple of an accepted one (or of no
    length). Pairs are accepted one by one, the best first, by the part of y that is independent of accepted ones of nearly
    the same value.

    Args:
        krylov: the basis.
        wanted: pairs.
        tol: of the estimates below which it is worth looking at the vectors.
        final: whether to look at them in any case.
        spare: groups of equal values to look at beyond the wanted ones, in place of what proved to be ghosts.

    Cost: an m x m eigensolve, and where the estimates have converged two products of the basis with the candidates.
    """
    values, vectors = torch.linalg.eigh(krylov.projected())
    candidates = _candidates(values, wanted.more(spare), krylov)
    found = _chosen(krylov, values, vectors, candidates)
    if not final and not _one_of_each(found, wanted).converged(tol).all():
        return found
    independent = _independent(krylov, found, wanted)
    absent = wanted.count - len(independent.values)
    if absent == 0 or len(candidates) == len(values) or (spare > 0 and not final):
        return independent
    return distinct_pairs(krylov, wanted, tol, final=final, spare=2 * max(spare, absent))


def _chosen(krylov: Krylov, values: Tensor, vectors: Tensor, chosen: Tensor, errors: Tensor | None = None) -> Ritz:
    scale = values.abs().max().item()
    floor = NOISE * krylov.eps * scale
    coordinates = vectors[:, chosen]
    residuals = (krylov.last_beta() * coordinates[-1]).abs()
    if errors is not None:
        residuals = torch.hypot(residuals, errors[chosen])
    residuals = (residuals + krylov.cut(coordinates)).clamp_min(floor)
    return Ritz(values[chosen], coordinates, residuals, scale, floor)


def _candidates(values: Tensor, wanted: Wanted, krylov: Krylov) -> Tensor:
    """Indices among ascending `values`, descending, with all copies of the wanted ones of each end."""
    radius = 1e3 * NOISE * krylov.eps * values.abs().max().item()
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


def _one_of_each(found: Ritz, wanted: Wanted) -> Ritz:
    """The best estimate of every group of equal values."""
    radius = 1e3 * found.floor
    kept: list[int] = []
    for i in range(len(found.values)):
        if kept and (found.values[kept[-1]] - found.values[i]).abs() <= radius:
            kept[-1] = i if found.residuals[i] < found.residuals[kept[-1]] else kept[-1]
        else:
            kept.append(i)
    return _subset(found, torch.tensor(kept), wanted)


def _subset(found: Ritz, kept: Tensor, wanted: Wanted) -> Ritz:
    ascending = kept[found.values[kept].argsort()]
    chosen = ascending[wanted.choose(found.values[ascending])]
    return Ritz(found.values[chosen], found.coordinates[:, chosen], found.residuals[chosen], found.scale, found.floor)


def _independent(krylov: Krylov, found: Ritz, wanted: Wanted) -> Ritz:
    vectors = krylov.vectors(found.coordinates)  # (P, c)
    gram = krylov.products.gram(vectors.T.contiguous()).cpu()
    errors = _true_errors(krylov, found.coordinates)
    lengths = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    weights = torch.zeros_like(gram)  # columns: the accepted vectors in terms of the candidates
    rounding = krylov.eps * found.scale * krylov.size**0.5  # of the relation; where y is short it is all there is
    residuals = ((errors + rounding) / lengths).clamp_min(found.floor)
    accepted: list[int] = []
    for i in residuals.argsort().tolist():
        z = torch.zeros(len(gram), dtype=torch.float64)
        z[i] = 1 / lengths[i]
        bound = residuals[i].clone()
        before = torch.tensor(accepted, dtype=torch.int64)
        near = before[(found.values[before] - found.values[i]).abs() <= 2 * (residuals[before] + residuals[i])]
        for _ in range(2):
            shares = weights[:, near].T @ (gram @ z)
            z -= weights[:, near] @ shares
            bound += shares.abs() @ residuals[near]
        length = (z @ gram @ z).clamp_min(0.0).sqrt()
        if length > _INDEPENDENT:
            weights[:, i] = z / length
            residuals[i] = bound / length
            accepted.append(i)
    independent = Ritz(found.values, found.coordinates @ weights, residuals, found.scale, found.floor)
    return _subset(independent, torch.tensor(accepted, dtype=torch.int64), wanted)


def _true_errors(krylov: Krylov, coordinates: Tensor) -> Tensor:
    """`||A Q s - theta Q s||` (c,) with what the passes took away: the basis is not orthonormal, so as vectors."""
    m = krylov.size
    last = krylov.last_beta() * coordinates[-1]
    taken = krylov.corrections[:m, :m].cpu() @ coordinates
    if not taken.any():
        return last.abs()
    errors = krylov.vectors(taken) + krylov.basis[m][:, None] * last.to(krylov.basis)
    return torch.stack([krylov.products.norm(column.contiguous()).cpu() for column in errors.T])
