"""Which measurements a run makes, and whether it has the optimizer they read."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError, RefusedError
from curvature_callbacks.measurements.base import Measurement, OfOptimizer
from curvature_callbacks.measurements.fisher_spectrum import FisherSpectrum
from curvature_callbacks.measurements.kfac_coverage import KFACCoverage
from curvature_callbacks.measurements.top_eigenpairs import TopEigenpairs
from curvature_callbacks.model.stability import Optimizers, read_stability


def chosen_measurements(measure: Sequence[Measurement] | None) -> list[Measurement]:
    """`measure`, or the default: Fisher spectrum, Hessian eigenpairs, K-FAC coverage."""
    return [FisherSpectrum(), TopEigenpairs(), KFACCoverage()] if measure is None else list(measure)


def check_measurements(measure: Sequence[Measurement]) -> None:
    """Raise a `ConfigurationError` for what is no measurement, and for two of one name."""
    for measurement in measure:
        if isinstance(measurement, type) or not isinstance(measurement, Measurement):
            raise ConfigurationError(
                f"`measure` must hold measurements such as FisherSpectrum(), got {measurement!r}: pass an instance with "
                "`name`, `init` and `measure`."
            )
    names = [measurement.name for measurement in measure]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"`measure` must hold measurements of different names, got {names}.")


def check_optimizer(measure: Sequence[Measurement], optimizer: Optimizers | None, parameters: Mapping[str, Tensor]) -> None:
    """Raise a `ConfigurationError` where a measurement needs an optimizer of these parameters, and there is none."""
    reading = [each.name for each in measure if isinstance(each, OfOptimizer) and each.needs_optimizer]
    if not reading:
        return
    if optimizer is None:
        raise ConfigurationError(
            f"measurement `{reading[0]}` needs the `optimizer`, got None: pass `optimizer=` to CurvatureMonitor (the callbacks "
            "pass their trainer's; there it is missing when that has none)."
        )
    with suppress(RefusedError, torch.OutOfMemoryError):  # which the first probe will meet and report
        read_stability(optimizer, parameters, dtype=torch.float32)
