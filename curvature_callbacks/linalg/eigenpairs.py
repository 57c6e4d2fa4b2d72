"""Eigenpairs: Ritz values with their residuals, and what they say about negative curvature."""

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

NOISE: Final = 10.0  # noise floor of a residual, of an eigenvalue and of a beta, in units of eps |lambda|_max


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Eigenpairs:
    """The wanted eigenvalues of a symmetric operator, each with an error bound.

    Every eigenvalue of a symmetric operator lies within `residual` of its Ritz value (Parlett 1998, theorem 4.5.1); where
    the next one is a gap away the error is about `residual^2 / gap`.

    Attributes:
        eigenvalues: (k,) float64 on CPU, descending.
        residuals: (k,) float64, `||A v - theta v||_2`; never below the arithmetic's noise floor `10 eps |lambda|_max`.
        converged: (k,) bool, `residual <= max(tol |theta|, 10 eps |lambda|_max)`: each pair by its own size, as in ARPACK.
        eigenvectors: (P, k) columns in the operator's dtype and device, or None when not asked for.
        num_matvecs: operator products spent.
        which: the end or ends asked for.
        reorth_mode: reorthogonalisation used; `gram` or `kronecker` for pairs from a Gram or from Kronecker factors rather than
            a Krylov space (residuals are then true ones).
        is_psd: whether the operator is known to be positive semi-definite.
        tol: relative tolerance of `converged`, also the threshold below which a value counts as negative.
        lambda_abs_max: largest `|theta|` the run saw.
        asymmetry: largest `|q_{j-1}' A q_j - beta_{j-1}| / lambda_abs_max`, of a Gram `|K_ij - K_ji| / max |K|`; rounding
            level for a symmetric operator.
        seconds: wall time.
        product_error: relative error of the products themselves, which no residual holds; 0 where they are exact to rounding.
            Of finite differences: how far two steps are apart along the outermost vectors.
        warnings: what a reader of the numbers should know, in sentences.
    """

    eigenvalues: Tensor
    residuals: Tensor
    converged: Tensor
    eigenvectors: Tensor | None
    num_matvecs: int
    which: str
    reorth_mode: str
    is_psd: bool
    tol: float
    lambda_abs_max: float
    asymmetry: float
    seconds: float
    product_error: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def is_iterative(self) -> bool:
        """Whether Lanczos found them from a start vector, rather than a decomposition of a Gram or of factors."""
        return self.reorth_mode not in ("gram", "kronecker")

    def metrics(self) -> dict[str, float]:
        """Scalars to log; what the run cannot say is absent.

        `lambda_max`, `lambda_min` are the outermost Ritz values, converged or not (a Ritz value never lies outside the
        spectrum, so a negative `lambda_min` proves negative curvature), with `residual_lambda_max` and
        `residual_lambda_min`, each where its end was asked for; `residual_max` is the largest *relative* residual
        `residual / |theta|` of the pairs that are not zero to rounding (zeros have none) and `num_converged` counts all those
        within tolerance; `product_error` where products are approximate. For indefinite operators, once the smallest pair has
        converged: `most_negative_eigenvalue` (positive when there is none), and with both ends, over the converged pairs,
        `ritz_negative_fraction` and `ritz_negative_mass = sum |theta < 0| / sum |theta|`, where negative means
        `theta < -tol |lambda|_max`.
        """
        if len(self.eigenvalues) == 0:
            return {}
        values = {"num_converged": float(self.converged.sum())}
        relative = self._relative_residuals()
        if len(relative) > 0:
            values |= {"residual_max": relative.max().item()}
        if self._has_upper_end:
            values |= {"lambda_max": self.eigenvalues[0].item(), "residual_lambda_max": self.residuals[0].item()}
        if self._has_lower_end:
            values |= {"lambda_min": self.eigenvalues[-1].item(), "residual_lambda_min": self.residuals[-1].item()}
        if self.product_error > 0:
            values |= {"product_error": self.product_error}
        return values if self.is_psd else values | self._negative_curvature()

    def starting_vector(self) -> Tensor:
        """(P,) where a run for the same pairs of a similar operator should start: `sum_i v_i / |theta_i|`.

        Pairs converge the later the smaller their `|theta|`, so these weigh more.
        """
        assert self.eigenvectors is not None, "asked of a run that keeps its eigenvectors"
        sizes = self.eigenvalues.abs().clamp_min(self.tol * self.lambda_abs_max)
        weights = 1 / torch.where(sizes > 0, sizes, 1.0)
        start: Tensor = self.eigenvectors @ (weights / weights.max()).to(self.eigenvectors)
        return start

    @property
    def _has_upper_end(self) -> bool:
        """Whether the first pair is the largest; among the largest in magnitude a positive one is."""
        return self.which in ("LA", "BE") or (self.which == "LM" and self.eigenvalues[0].item() > 0)

    @property
    def _has_lower_end(self) -> bool:
        """Whether the last pair is the smallest; of a single pair at both ends it is the largest."""
        both = self.which == "BE" and len(self.eigenvalues) > 1
        return both or self.which == "SA" or (self.which == "LM" and self.eigenvalues[-1].item() < 0)

    def _relative_residuals(self) -> Tensor:
        """`residual / abs(theta)` of each pair but zeros: converged pairs whose value is at most their residual."""
        sizes = self.eigenvalues.abs()
        kept = ~self.converged | (sizes > self.residuals)
        return self.residuals[kept] / sizes[kept].clamp_min(torch.finfo(torch.float64).tiny)

    def _negative_curvature(self) -> dict[str, float]:
        """Nothing unless the negative end is known: the largest pairs alone say 0 for spectra with 47 % negative mass."""
        if not self._has_lower_end or not self.converged[-1]:
            return {}
        lowest = {"most_negative_eigenvalue": self.eigenvalues[-1].item()}
        if self.which != "BE":
            return lowest
        ritz = self.eigenvalues[self.converged]
        negative = ritz < -self.tol * self.lambda_abs_max
        total = ritz.abs().sum().item()
        return lowest | {
            "ritz_negative_fraction": negative.double().mean().item(),
            "ritz_negative_mass": ritz[negative].abs().sum().item() / total if total > 0 else 0.0,
        }


def noise_floor(dtype: torch.dtype, scale: float) -> float:
    """The size below which residuals and eigenvalues are rounding, where the largest `|lambda|` is `scale`."""
    return NOISE * torch.finfo(dtype).eps * scale


def shortfalls(converged: Tensor, k: int, P: int, tol: float) -> tuple[str, ...]:
    """Warnings of a solver without a Krylov space: more pairs asked for than there are, pairs at rounding level."""
    messages = []
    if k > P:
        messages.append(f"`k`={k} exceeds the dimension {P}: {P} pairs are returned.")
    missing = int((~converged).sum())
    if missing:
        messages.append(f"{missing} of {len(converged)} pairs did not reach `tol`={tol:g}: they are at rounding level.")
    return tuple(messages)
