"""Measurements: what a probe computes, as frozen, JSON-able configurations."""

from curvature_callbacks.measurements.base import Measurement
from curvature_callbacks.measurements.choice import checked_measurements
from curvature_callbacks.measurements.fisher_spectrum import FisherSpectrum
from curvature_callbacks.measurements.kfac_coverage import KFACCoverage
from curvature_callbacks.measurements.top_eigenpairs import TopEigenpairs

__all__ = ["FisherSpectrum", "KFACCoverage", "Measurement", "TopEigenpairs", "checked_measurements"]
