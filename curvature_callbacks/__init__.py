"""Curvature of the training loss, measured while the network trains.

Glossary, one word per concept. *Step*: an optimizer step. *Probe*: one measurement time with its *microbatches*. *Row*: one
sample of a batch. *Block*: a named group of parameters; what is about all of them is *model-wide*. *Measurement*: what is
computed at a probe. *Record*: what one measurement says about one block at one step. *Sink*: what receives records. *Operator*:
a symmetric map known by its products (*matvecs*). *Eigenpairs*: Ritz values with *residuals*. *Gram*: inner products of the
gradients of samples. docs/architecture.md has all the words and the map of the code.

Letters: P parameters, N samples, S pseudo-samples, T positions (tokens), C outputs, B blocks, K vectors side by side, k kept
eigenpairs, m steps of Lanczos.

Conventions: sample i is one row, its loss `l_i` is the *sum* over its valid targets, `n_i` counts them; the objective is
`L = sum_i l_i / sum_i n_i`; the empirical Fisher is `F = (1/N) sum_i g_i g_i'` with `g_i = grad l_i`. Everything is measured in
evaluation mode, but for batch norms in Hessians, the GGN and the edge ratio (`batch_norm`), and in float32 or better.
"""

from curvature_callbacks.compute.eigenpairs import compute_spectrum
from curvature_callbacks.compute.fisher_spectrum import compute_fisher_spectrum
from curvature_callbacks.compute.kfac_coverage import compute_kfac_coverage
from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError
from curvature_callbacks.linalg.combination import LinearCombination
from curvature_callbacks.linalg.density import Density
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos.solver import lanczos
from curvature_callbacks.linalg.operator import MatrixOperator, Operator
from curvature_callbacks.linalg.quadrature import spectral_density
from curvature_callbacks.measurements import (
    EdgeRatio,
    FisherSpectrum,
    GradientNoise,
    KFACCoverage,
    KFACQuality,
    Measurement,
    SpectralDensity,
    TopEigenpairs,
)
from curvature_callbacks.measurements.kfac_coverage import KFACCoverageReport
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.probes import CapturedProbes, DatasetProbes, FixedProbes, Probes
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import Record
from curvature_callbacks.run.monitor import CurvatureMonitor
from curvature_callbacks.run.schedules import AtSteps, EveryNSteps, LogSpaced, LossSpike, Schedule
from curvature_callbacks.sinks import JSONLinesSink, MemorySink, Sink, read_records
from curvature_callbacks.statistics.fisher_spectra import FisherSpectra
from curvature_callbacks.statistics.spectrum import Spectrum

__version__ = "0.1.0"

__all__ = [
    "AtSteps",
    "CapturedProbes",
    "ConfigurationError",
    "CurvatureMonitor",
    "DatasetProbes",
    "Density",
    "EdgeRatio",
    "Eigenpairs",
    "EveryNSteps",
    "FisherSpectra",
    "FisherSpectrum",
    "FixedProbes",
    "GradientNoise",
    "JSONLinesSink",
    "KFACCoverage",
    "KFACCoverageReport",
    "KFACQuality",
    "LinearCombination",
    "LogSpaced",
    "LossSpike",
    "MatrixOperator",
    "Measurement",
    "MemorySink",
    "Microbatch",
    "Operator",
    "ProbeError",
    "Probes",
    "Problem",
    "Record",
    "RefusedError",
    "Schedule",
    "Sink",
    "SpectralDensity",
    "Spectrum",
    "TopEigenpairs",
    "compute_fisher_spectrum",
    "compute_kfac_coverage",
    "compute_spectrum",
    "lanczos",
    "read_records",
    "spectral_density",
]
