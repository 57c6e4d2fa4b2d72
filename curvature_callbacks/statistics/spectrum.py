"""Spectrum: eigenvalues of a Fisher matrix from its Gram matrix, and the numbers read off it."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.errors import LinAlgError

_JITTERS: Final = (1e-14, 1e-12, 1e-10, 1e-8)  # relative to the mean diagonal; tried only when eigh fails


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectrum:
    """The non-zero eigenvalues of `F = sum_s g_s g_s' / normaliser`; the normaliser is N where each gradient is a sample.

    Attributes:
        eigenvalues: (r,) float64 on CPU, descending, in units of (loss / parameter)^2; those above `tau lambda_1` with
            `tau = N eps`.
        num_samples: N, the gradients used: rows, or one for every target, draw and class of them (pseudo-samples).
        num_params: P, the dimension of F.
        trace: `tr F`, from the diagonal of the Gram (all eigenvalues, also those cut), in the unit of the eigenvalues.
        jitter: what had to be added to the diagonal for the eigensolver to succeed, in that unit; 0 otherwise.
        pair_statistics: unbiased statistics over pairs of gradients of different rows, empty for a union of spectra.
    """

    eigenvalues: Tensor
    num_samples: int
    num_params: int
    trace: float
    jitter: float = 0.0
    pair_statistics: Mapping[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Numerical rank r: eigenvalues above `tau lambda_1`. At most N, and nearly always N: not an effective rank."""
        return len(self.eigenvalues)

    def metrics(self, *, damping: float = 1e-3) -> dict[str, float]:
        """The numbers of this spectrum (lambda_1 >= ... >= lambda_r; all but the first six are free of the loss scale).

        `lambda_max`, `trace`, `spectral_gap = lambda_1 - lambda_2`, `mean_gradient_norm_squared = mean_{i!=j} g_i.g_j` (also
        where F is centred; absent where the mean is zero by definition),
        `rank`, `num_samples`; `condition_number = lambda_1 / lambda_r`; `condition_number_damped = (lambda_1 + damping) /
        (lambda_min + damping)` with lambda_min = 0 when r < P (`damping` in units of the eigenvalues);
        `effective_rank = exp(entropy of lambda / sum)` (Roy and Vetterli 2007); `stable_rank = sum lambda^2 / lambda_1^2`;
        `participation_ratio = (sum lambda)^2 / sum lambda^2` and its unbiased form over pairs of samples
        `sum K_ii K_jj / sum K_ij^2` (the plug-in one is 30 to 80 % low at N = 8 to 64; absent where F is centred, whose
        gradients depend on each other); `top_share = lambda_1 / trace`.
        Empty for an empty or zero spectrum but for `rank`, `trace` and `num_samples`.
        """
        counts = {"rank": float(self.rank), "num_samples": float(self.num_samples), "trace": self.trace}
        if self.rank == 0:
            return counts
        top, bottom = self.eigenvalues[0].item(), self.eigenvalues[-1].item()
        share = self.eigenvalues / self.eigenvalues.sum()
        relative = self.eigenvalues / top
        smallest = bottom if self.rank == self.num_params else 0.0
        return {
            **counts,
            "lambda_max": top,
            "condition_number": top / bottom,
            "condition_number_damped": (top + damping) / (smallest + damping),
            "effective_rank": math.exp(-(share * share.log()).sum().item()),
            "stable_rank": relative.square().sum().item(),
            "participation_ratio": 1.0 / share.square().sum().item(),
            "spectral_gap": top - self.eigenvalues[1].item() if self.rank > 1 else top,
            "top_share": top / self.trace,
            **self.pair_statistics,
        }


def spectrum_of_gram(
    gram: Tensor,
    *,
    num_params: int,
    dtype: torch.dtype,
    normaliser: float | None = None,
    weights: Tensor | None = None,
    samples: Tensor | None = None,
    center: bool = False,
    device: torch.device | None = None,
) -> Spectrum:
    """Spectrum of `F = G' G / normaliser` from the Gram `G G'` of N gradients, `sqrt(w_s) g_s` each.

    Nothing is added to the diagonal unless the eigensolver fails; then the smallest jitter that works, recorded.

    Args:
        gram: (N, N), unscaled, any device.
        num_params: P.
        dtype: dtype the gradients were computed in; sets the rank cut `tau = N eps` (2^-8 for bf16 and fp16).
        normaliser: what the sum of outer products is divided by; default N. The sum of all `w_s` where these are weights.
        weights: (N,) `w_s`, default ones. All zero where the mean gradient is zero by definition: centring then changes
            nothing, and no mean is reported.
        samples: (N,) the row each gradient belongs to, default each its own: only pairs of different rows are independent, and
            the pair statistics are taken over those.
        center: of the covariance `F - g g'`, `g = sum_s w_s g_s / normaliser`.
        device: where to run the eigensolver; default the Gram's.

    Cost: one N x N symmetric eigensolve in float64.
    """
    N = gram.shape[0]
    K = gram.to(device=device or gram.device, dtype=torch.float64)
    scale = float(N if normaliser is None else normaliser) or 1.0
    w = torch.ones(N, dtype=K.dtype, device=K.device) if weights is None else weights.to(K)
    rows = torch.arange(N, device=K.device) if samples is None else samples.to(K.device)
    statistics = _pair_statistics(K, w, rows, center=center)
    K = (centred(K, w / scale) if center else K) / scale
    values, jitter = _eigenvalues(K)
    values = values.cpu().flip(0)[: max(num_params, 0)]
    nonzero = values[values > rank_cut(N, dtype) * values[:1].clamp_min(0.0)] if N else values
    return Spectrum(
        eigenvalues=nonzero,
        num_samples=N,
        num_params=num_params,
        trace=K.diagonal().sum().item(),
        jitter=jitter,
        pair_statistics=statistics,
    )


def union(spectra: Mapping[str, Spectrum], *, dtype: torch.dtype) -> Spectrum:
    """Spectrum of the block-diagonal matrix with the given blocks: the union, cut again relative to its largest."""
    parts = list(spectra.values())
    N = max((part.num_samples for part in parts), default=0)
    values = torch.cat([part.eigenvalues for part in parts] or [torch.empty(0, dtype=torch.float64)])
    values = values.sort(descending=True).values
    return Spectrum(
        eigenvalues=values[values > rank_cut(N, dtype) * values[:1]] if len(values) else values,
        num_samples=N,
        num_params=sum(part.num_params for part in parts),
        trace=math.fsum(part.trace for part in parts),
    )


def centred(gram: Tensor, shares: Tensor | None = None) -> Tensor:
    """`H K H` with `H = I - u u'`, `u_s = sqrt(shares_s)`: the Gram whose spectrum is that of the covariance `F - g g'`.

    With the default shares `1/N` it is the Gram of `g_i - mean g`. `shares` (N,) add up to one, or are all zero.
    """
    N = len(gram)
    u = (gram.new_full((N,), 1.0 / max(N, 1)) if shares is None else shares).sqrt()
    product = gram @ u
    rank_two = torch.outer(u, product) + torch.outer(product, u)
    return gram - rank_two + (u @ product) * torch.outer(u, u)


def rank_cut(N: int, dtype: torch.dtype) -> float:
    """`N eps`: eigenvalues below this share of the largest are rounding where N gradients were computed in `dtype`."""
    eps = 2.0**-8 if dtype in (torch.bfloat16, torch.float16) else torch.finfo(dtype).eps
    return N * eps


def _eigenvalues(K: Tensor) -> tuple[Tensor, float]:
    try:
        return torch.linalg.eigvalsh(K), 0.0
    except LinAlgError:
        return _eigenvalues_with_jitter(K)


def _eigenvalues_with_jitter(K: Tensor) -> tuple[Tensor, float]:
    unit = K.diagonal().mean().item()
    for relative in _JITTERS:
        try:
            values = torch.linalg.eigvalsh(K + relative * unit * torch.eye(len(K), dtype=K.dtype, device=K.device))
        except LinAlgError:
            continue
        warnings.warn(f"the eigensolver needed {relative:g} of the mean eigenvalue on the diagonal.", stacklevel=2)
        return values - relative * unit, relative * unit
    raise LinAlgError("the eigensolver failed with every jitter tried: are the gradients finite?")


def _pair_statistics(K: Tensor, w: Tensor, rows: Tensor, *, center: bool) -> dict[str, float]:
    """Means over pairs of different rows of `g_s.g_t`, `K_ss K_tt` and `K_st^2`, free of the bias of the others.

    They are statistics of the gradients as they are: of centred ones, which depend on each other, no ratio is given.
    """
    other_row = rows[:, None] != rows
    if not other_row.any():
        return {}
    apart = K * other_row
    weight = _sum_over_pairs(w, other_row)
    mean = (w.sqrt() @ apart @ w.sqrt()).item()
    statistics = {"mean_gradient_norm_squared": mean / weight} if weight > 0 else {}
    if not center:
        squares = apart.square().sum().item()
        products = _sum_over_pairs(K.diagonal(), other_row)
        statistics["participation_ratio_unbiased"] = products / squares if squares > 0 else math.inf
    return statistics


def _sum_over_pairs(x: Tensor, pairs: Tensor) -> float:
    return (x @ pairs.to(x.dtype) @ x).item()
