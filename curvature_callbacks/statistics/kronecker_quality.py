"""Kronecker quality: how well `A x G` stands for a Fisher matrix, and the numbers of `A x G` itself, with nothing P x P."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.linalg.kronecker import KroneckerFactors


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Approximation:
    """How near `K = A x G` and `E = U diag(c) U'` (EKFAC) are to the Fisher block F in the Frobenius norm.

    E is the best matrix in K's eigenbasis: `<F, E> = |E|^2`, so its error is never above that of K. Errors below 1e-3 are
    rounding for float32 gradients (a difference of squares good to 1e-7). nan where F (for cosines also K or E) is zero.

    Attributes:
        fisher_squared: `|F|^2`.
        kfac_squared: `|A|^2 |G|^2`.
        ekfac_squared: `|c|^2`.
        inner: `<F, A x G>`.
    """

    fisher_squared: float
    kfac_squared: float
    ekfac_squared: float
    inner: float

    @property
    def kfac_cosine(self) -> float:
        """`<F, K> / (|F| |K|)`, 0..1."""
        return _quotient(self.inner, math.sqrt(self.fisher_squared) * math.sqrt(self.kfac_squared))

    @property
    def kfac_relative_error(self) -> float:
        """`|F - K| / |F|`, 0 upwards."""
        squared = _quotient(self.fisher_squared - 2 * self.inner + self.kfac_squared, self.fisher_squared)
        return math.sqrt(max(squared, 0.0))  # nan stays nan

    @property
    def ekfac_cosine(self) -> float:
        """`<F, E> / (|F| |E|) = |E| / |F|`, 0..1."""
        return _quotient(self.ekfac_squared, math.sqrt(self.fisher_squared) * math.sqrt(self.ekfac_squared))

    @property
    def ekfac_relative_error(self) -> float:
        """`|F - E| / |F|`, 0..1."""
        squared = _quotient(self.fisher_squared - self.ekfac_squared, self.fisher_squared)
        return math.sqrt(max(squared, 0.0))  # nan stays nan


def approximation(factors: KroneckerFactors, gram: Tensor, *, normaliser: float) -> Approximation:
    """Quality of K-FAC and EKFAC for `F = (1/normaliser) sum_s g_s g_s'`.

    `|F| = |gram| / normaliser`, `<F, A x G> = sum_jk corrected_jk lambda_j mu_k`: the corrected eigenvalues are the diagonal of
    F in the eigenbasis in which `A x G` is diagonal.

    Args:
        factors: with `corrected`.
        gram: (S, S), `g_s . g_s'` over the layer's weight and bias.
        normaliser: of F.
    """
    assert factors.corrected is not None
    corrected, a, g = factors.corrected, factors.A.eigenvalues, factors.G.eigenvalues
    return Approximation(
        fisher_squared=(gram.to(torch.float64).norm().item() / normaliser) ** 2,
        kfac_squared=(a.norm() * g.norm()).item() ** 2,
        ekfac_squared=corrected.norm().item() ** 2,
        inner=(g @ corrected @ a).item(),
    )


def block_diagonal(parts: Iterable[Approximation]) -> Approximation:
    """Quality for the block-diagonal matrices of several layers: inner products add, so each layer counts by its `|F|`."""
    listed = list(parts)
    return Approximation(
        fisher_squared=math.fsum(part.fisher_squared for part in listed),
        kfac_squared=math.fsum(part.kfac_squared for part in listed),
        ekfac_squared=math.fsum(part.ekfac_squared for part in listed),
        inner=math.fsum(part.inner for part in listed),
    )


def kronecker_metrics(factors: KroneckerFactors, *, rank_cut: float) -> dict[str, float]:
    """The numbers of `A x G` and its factors, from their two lists of eigenvalues.

    `lambda_max`, `trace`, `frobenius_norm` of `A x G`; `condition_number` (largest over smallest eigenvalue above
    `rank_cut` times the largest) and `effective_rank` (exp of the entropy of those, Roy and Vetterli 2007) of A (`input_`),
    of G (`output_`) and of `A x G`: products of the two, since entropies add. Empty where a factor is zero.
    """
    if min(len(factors.A.eigenvalues), len(factors.G.eigenvalues)) == 0:
        return {}
    a, g = factors.A.eigenvalues, factors.G.eigenvalues
    conditions, ranks = zip(*(_condition_and_rank(values, rank_cut) for values in (a, g)), strict=True)
    return {
        "lambda_max": (a[0] * g[0]).item(),
        "trace": (a.sum() * g.sum()).item(),
        "frobenius_norm": (a.norm() * g.norm()).item(),
        "condition_number": math.prod(conditions),
        "effective_rank": math.prod(ranks),
        "input_condition_number": conditions[0],
        "output_condition_number": conditions[1],
        "input_effective_rank": ranks[0],
        "output_effective_rank": ranks[1],
    }


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _condition_and_rank(eigenvalues: Tensor, rank_cut: float) -> tuple[float, float]:
    kept = eigenvalues[eigenvalues > rank_cut * eigenvalues[0]]
    share = kept / kept.sum()
    return (kept[0] / kept[-1]).item(), math.exp(-(share * share.log()).sum().item())
