"""Measurements: what a probe computes, as frozen, JSON-able configurations."""

from curvature_callbacks.measurements.base import Checked, Measurement, OfFisher, OfKronecker, OfOptimizer
from curvature_callbacks.measurements.edge_ratio import EdgeRatio
from curvature_callbacks.measurements.fisher_spectrum import FisherSpectrum
from curvature_callbacks.measurements.gradient_noise import GradientNoise
from curvature_callbacks.measurements.kfac_coverage import KFACCoverage
from curvature_callbacks.measurements.kfac_quality import KFACQuality
from curvature_callbacks.measurements.spectral_density import SpectralDensity
from curvature_callbacks.measurements.top_eigenpairs import TopEigenpairs

__all__ = [
    "Checked",
    "EdgeRatio",
    "FisherSpectrum",
    "GradientNoise",
    "KFACCoverage",
    "KFACQuality",
    "Measurement",
    "OfFisher",
    "OfKronecker",
    "OfOptimizer",
    "SpectralDensity",
    "TopEigenpairs",
]
