"""GradientStatistics: scatter and agreement of N per-sample gradients, from their Gram `K_ij = g_i . g_j` alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

_QUANTILES: Final[Mapping[str, float]] = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientStatistics:
    """Statistics of gradients `g_1 ... g_N` drawn from a distribution of mean G and covariance Sigma.

    The unit u of a gradient is that of its loss over a parameter's; cosines, shares and `diversity` have none.

    Attributes:
        norms: (N,) float64 on CPU, `||g_i||`, in u.
        covariance_trace: unbiased estimate of `tr Sigma` of one gradient (of a mean of B of them it is a B-th), in u^2, never
            negative.
        mean_gradient_norm_squared: unbiased estimate of `||G||^2`, the mean of `g_i . g_j` over pairs i != j, in u^2. It may be
            negative: its scatter is as large as it is where N is below `tr Sigma / ||G||^2`.
        standard_error: of `mean_gradient_norm_squared`, by leaving one sample out (jackknife); None for N = 2.
        diversity: `sum_i ||g_i||^2 / ||sum_i g_i||^2`, 1/N for equal gradients, 1 for orthogonal ones; None when they cancel.
        mean_cosine: mean over pairs i != j of the cosine between g_i and g_j; None without a defined pair.
        conflict_share: share of these pairs with a negative cosine; None without a defined pair.
        num_undefined_pairs: pairs left out of both because one of the gradients is zero.
    """

    norms: Tensor
    covariance_trace: float
    mean_gradient_norm_squared: float
    standard_error: float | None
    diversity: float | None
    mean_cosine: float | None
    conflict_share: float | None
    num_undefined_pairs: int

    @property
    def num_samples(self) -> int:
        """N, the number of gradients."""
        return len(self.norms)

    def norm_quantiles(self) -> dict[str, float]:
        """`norm_{min,q25,median,q75,q95,max}`: quantiles of `||g_i||` over the samples, linearly interpolated."""
        levels = torch.tensor(list(_QUANTILES.values()), dtype=self.norms.dtype)
        values = torch.quantile(self.norms, levels).tolist()
        return {f"norm_{name}": value for name, value in zip(_QUANTILES, values, strict=True)}


def gradient_statistics(gram: Tensor) -> GradientStatistics:
    """Statistics of the gradients with the Gram `gram` (N, N), unscaled, N >= 2, finite (unchecked), any device.

    With `s = 1'K1` and `t = tr K`: `||G||^2 = (s - t) / (N (N-1))` and `tr Sigma = (t/N - s/N^2) N / (N-1)`, which is the
    two-batch estimator of McCandlish et al. with batches of 1 and N.

    Cost: one transfer of the Gram to the CPU and O(N^2) work there in float64.

    References: McCandlish, Kaplan, Amodei et al. (2018), "An empirical model of large-batch training", appendix A.1; Yin et
    al. (2018), "Gradient diversity", for `diversity`; Fort et al. (2019), "Stiffness", for the cosines.

    Example:
        >>> import torch
        >>> g = torch.tensor([[3.0, 0.0], [1.0, 1.0], [2.0, -1.0]])
        >>> found = gradient_statistics(g @ g.T)
        >>> round(found.covariance_trace, 6) == round(torch.cov(g.T).trace().item(), 6)
        True
    """
    K = gram.to(device="cpu", dtype=torch.float64)
    N = len(K)
    squares = K.diagonal().clamp_min(0.0)
    sums = K.sum(dim=1) - K.diagonal()  # (N,): sum_{j != i} g_i . g_j
    t, off_diagonal = squares.sum().item(), sums.sum().item()
    s = t + off_diagonal
    signal = off_diagonal / (N * (N - 1))
    mean_cosine, conflict_share, defined = _cosines(K, squares.sqrt())
    return GradientStatistics(
        norms=squares.sqrt(),
        covariance_trace=max((t / N - s / N**2) * N / (N - 1), 0.0),  # below zero by rounding only
        mean_gradient_norm_squared=signal,
        standard_error=_jackknife(sums, signal) if N > 2 else None,
        diversity=t / s if s > 0 else None,
        mean_cosine=mean_cosine,
        conflict_share=conflict_share,
        num_undefined_pairs=N * (N - 1) // 2 - defined,
    )


def half_vector(gram: Tensor) -> Tensor:
    """(N (N+1) / 2,) float64 on CPU: the upper triangle, off-diagonal entries times sqrt 2.

    Inner products of these vectors are the Frobenius inner products of the symmetric matrices, at half the memory.
    """
    K = gram.to(device="cpu", dtype=torch.float64)
    scaled = K * math.sqrt(2.0)
    scaled.diagonal().copy_(K.diagonal())
    return scaled[torch.triu(torch.ones_like(K, dtype=torch.bool))]


def kernel_drift(kernel: Tensor, reference: Tensor) -> float | None:
    """`1 - <K, K_0> / (||K|| ||K_0||)` from the `half_vector` of either; None when one is zero.

    Between 0 (equal up to a factor) and 1 (gradients of no common direction), as both are positive semi-definite.

    References: Fort et al. (2020), "Deep learning versus kernel learning".
    """
    norms = kernel.norm(), reference.norm()
    if not all(norm > 0 for norm in norms):
        return None
    difference = kernel / norms[0] - reference / norms[1]
    return float(difference.square().sum()) / 2.0  # 1 - u.v of unit vectors, without its cancellation


def _jackknife(sums: Tensor, mean: float) -> float:
    """Standard error of the mean over pairs, from the same mean without sample i, for each i."""
    N = len(sums)
    without = (sums.sum() - 2.0 * sums) / ((N - 1) * (N - 2))
    return math.sqrt((N - 1) / N * (without - mean).square().sum().item())


def _cosines(K: Tensor, norms: Tensor) -> tuple[float | None, float | None, int]:
    """Mean cosine, share of negative ones, and number of the pairs whose gradients are both not zero."""
    nonzero = norms > 0
    M = int(nonzero.sum())
    pairs = M * (M - 1) // 2
    if pairs == 0:
        return None, None, 0
    lengths = norms[nonzero]
    cosines = (K[nonzero][:, nonzero] / lengths[:, None] / lengths).clamp(-1.0, 1.0).fill_diagonal_(0.0)
    return cosines.sum().item() / (2 * pairs), int((cosines < 0).sum()) / (2 * pairs), pairs
