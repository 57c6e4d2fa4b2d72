"""Density: what stochastic Lanczos quadrature says about all eigenvalues of an operator."""

from dataclasses import dataclass
from typing import Final, final

from torch import Tensor

ESTIMATES: Final = ("trace", "frobenius_norm", "negative_mass", "negative_fraction", "effective_rank")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Density:
    """Estimates over all eigenvalues, each with its standard error over the probes (jackknife).

    A standard error is the statistical one; the bias of few steps comes on top (negative mass: at most 0.011 at 40 steps).

    Attributes:
        grid: (n,) float64 on CPU, ascending.
        density: (n,) share of the eigenvalues per unit of the operator; integrates to one.
        density_standard_error: (n,).
        width: standard deviation of the Gaussian each node is drawn with.
        trace: sum of the eigenvalues.
        frobenius_norm: `sqrt(sum lambda^2)`.
        negative_mass: `sum |lambda < 0| / sum |lambda|`, 0..1.
        negative_fraction: share of the eigenvalues below `-1e-3 |lambda|_max`, 0..1.
        effective_rank: exp of the entropy of `|lambda| / sum |lambda|` (Roy and Vetterli 2007), 1..P; zero for the zero matrix.
        lambda_abs_max: largest absolute node.
        num_matvecs: operator products spent.
        num_probes: random vectors.
        num_steps: nodes of the longest run; fewer than asked for where the spectrum has fewer values.
        num_deflated: eigenpairs that entered exactly.
        is_psd: whether the operator is known to be positive semi-definite.
        seconds: wall time.
    """

    grid: Tensor
    density: Tensor
    density_standard_error: Tensor
    width: float
    trace: float
    trace_standard_error: float
    frobenius_norm: float
    frobenius_norm_standard_error: float
    negative_mass: float
    negative_mass_standard_error: float
    negative_fraction: float
    negative_fraction_standard_error: float
    effective_rank: float
    effective_rank_standard_error: float
    lambda_abs_max: float
    num_matvecs: int
    num_probes: int
    num_steps: int
    num_deflated: int
    is_psd: bool
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Scalars to log, each with `_standard_error`; the negative ones, as `slq_...`, for indefinite operators only."""
        scalars = {}
        for name in ESTIMATES:
            if not (self.is_psd and name.startswith("negative")):
                tag = f"slq_{name}" if name.startswith("negative") else name
                scalars[tag] = getattr(self, name)
                scalars[f"{tag}_standard_error"] = getattr(self, f"{name}_standard_error")
        return scalars
