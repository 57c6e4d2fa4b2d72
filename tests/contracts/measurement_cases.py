"""Every built-in measurement, with options that change what it computes."""

from typing import Any, get_args

from curvature_callbacks import (
    EdgeRatio,
    FisherSpectrum,
    GradientNoise,
    KFACCoverage,
    KFACQuality,
    SpectralDensity,
    TopEigenpairs,
)
from curvature_callbacks.problem.matrix import OperatorName

VARIANTS: list[Any] = [
    FisherSpectrum(),
    FisherSpectrum(center_gradients=True, damping=0.1, eigensolve_device="cpu"),
    FisherSpectrum(fisher="sampled", num_draws=2),
    FisherSpectrum(fisher="exact", center_gradients=True),
    FisherSpectrum(sample_unit="token"),
    FisherSpectrum(max_params_per_block=10),
    FisherSpectrum(deterministic=True),
    FisherSpectrum(max_sample_grad_norm=0.1),
    TopEigenpairs(k=2, max_matvecs=6),
    TopEigenpairs(k=1, which="LA", max_matvecs=6, per_block=True),
    TopEigenpairs(operator="empirical_fisher", k=3, per_block=True),
    TopEigenpairs(operator="empirical_fisher", sample_unit="token", which="LA", k=1, max_matvecs=6),
    *(TopEigenpairs(operator=name, k=2, max_matvecs=12) for name in get_args(OperatorName)),
    TopEigenpairs(operator="sampled_fisher", sample_unit="token", num_draws=2, k=1, which="LA", per_block=True),
    TopEigenpairs(operator="ekfac", fisher="sampled", num_draws=2, sharing="reduce", k=2, which="LA", per_block=True),
    TopEigenpairs(operator="ggn", which="LA", per_block=True, reorth_mode="partial", warm_start=False, max_seconds=60.0),
    SpectralDensity(num_probes=2, num_steps=8),
    SpectralDensity(operator="ggn", num_probes=2, num_steps=8, deflate=0),
    SpectralDensity(operator="preconditioned_hessian", num_probes=2, num_steps=8, deflate=1),
    EdgeRatio(),
    KFACCoverage(),
    KFACQuality(),
    KFACQuality(fisher="sampled", sharing="reduce", num_draws=2),
    KFACQuality(fisher="exact", sample_unit="token", k=3),
    GradientNoise(),
    GradientNoise(decay=0.0),
]
