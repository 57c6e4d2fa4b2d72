"""Probes: microbatches drawn from the training data without moving anything the training loop draws from."""

from curvature_callbacks.probes.base import Draw, FixedProbes, Prepare, Probes, stable_seed, with_seeds
from curvature_callbacks.probes.captured import CapturedProbes
from curvature_callbacks.probes.dataset import DatasetProbes, as_probes, check_dataset, probes_from_loader

__all__ = [
    "CapturedProbes",
    "DatasetProbes",
    "Draw",
    "FixedProbes",
    "Prepare",
    "Probes",
    "as_probes",
    "check_dataset",
    "probes_from_loader",
    "stable_seed",
    "with_seeds",
]
