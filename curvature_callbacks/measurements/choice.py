"""Which measurements a run makes."""

from collections.abc import Sequence

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.measurements.base import Measurement
from curvature_callbacks.measurements.fisher_spectrum import FisherSpectrum
from curvature_callbacks.measurements.kfac_coverage import KFACCoverage
from curvature_callbacks.measurements.top_eigenpairs import TopEigenpairs


def checked_measurements(measure: Sequence[Measurement] | None) -> list[Measurement]:
    """`measure` or the default, each of the right kind and name."""
    default: list[Measurement] = [FisherSpectrum(), TopEigenpairs(), KFACCoverage()]
    chosen = default if measure is None else list(measure)
    for measurement in chosen:
        if isinstance(measurement, type) or not isinstance(measurement, Measurement):
            raise ConfigurationError(
                f"`measure` must hold measurements such as FisherSpectrum(), got {measurement!r}: pass an instance with "
                "`name`, `init` and `measure`."
            )
    names = [measurement.name for measurement in chosen]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"`measure` must hold measurements of different names, got {names}.")
    return chosen
