"""Gradient noise scale, agreement of the samples' gradients and drift of their kernel, from the Fisher's Gram."""

import ctypes
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypedDict, final

import torch
from torch import Tensor

from curvature_callbacks.batches import dtype_name, map_tensors
from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.linalg.accumulate import finite_samples
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import Record
from curvature_callbacks.statistics.gradients import GradientStatistics, gradient_statistics, half_vector, kernel_drift

_NAME: Final = "gradient_noise"
_HEADLINE: Final = ("scale", "mean_cosine", "conflict_share", "kernel_drift")
_NO_SIGNAL: Final = "the average of `mean_gradient_norm_squared` is not positive"
_NO_PAIRS: Final = "fewer than two gradients differ from zero"


class _Averages(TypedDict):
    """Moving averages, each to be divided by `weight` (1 less the weight of the zero they start from)."""

    weight: float
    covariance_trace: float
    mean_gradient_norm_squared: float


class _Reference(TypedDict):
    """The kernel of the first probe: SHA-1 of its rows, its step, and the `half_vector` of the Gram."""

    rows: str
    step: int
    kernel: list[float]


class GradientNoiseState(TypedDict):
    """What `GradientNoise` carries from probe to probe; plain data, so that any checkpoint can hold it."""

    whole: _Averages  # model-wide; the key stands in checkpoints
    blocks: dict[str, _Averages]
    reference: _Reference | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GradientNoise:
    """Gradient noise scale and what else the Gram of the per-sample gradients tells.

    A sample is a row (a sequence, an image), `g_i` the gradient of its loss *summed* over its valid targets, G the mean and
    Sigma the covariance of `g_i` over the data, K the Gram `K_ij = g_i . g_j` of the probe's N rows.

    | tag | meaning | range | high (low) means |
    | --- | --- | --- | --- |
    | `curvature/gradient_noise_scale` | `tr Sigma / norm(G)^2` of moving averages | >= 0 | larger batches pay (smaller do) |
    | `curvature/gradient_noise_mean_cosine` | mean cosine of two rows' gradients | -1/(N-1)..1 | rows agree (are unrelated) |
    | `curvature/gradient_noise_conflict_share` | share of the pairs with cosine < 0 | 0..1 | helping one row hurts another |
    | `curvature/gradient_noise_kernel_drift` | `1 - cos(K, K_0)`, K_0 of the first probe | 0..1 | gradients turned (did not) |
    | `curvature_gradient_noise/covariance_trace` | `tr Sigma`, this probe, unbiased | >= 0 | gradients scatter |
    | `curvature_gradient_noise/mean_gradient_norm_squared` | `norm(G)^2`, this probe, unbiased | | (< 0: lost in the noise) |
    | `curvature_gradient_noise/mean_gradient_norm_squared_standard_error` | its standard error over rows | >= 0 | no trust |
    | `curvature_gradient_noise/covariance_trace_average` | moving average, numerator of the scale | >= 0 | |
    | `curvature_gradient_noise/mean_gradient_norm_squared_average` | moving average, denominator of the scale | | |
    | `curvature_gradient_noise/diversity` | `sum norm(g_i)^2 / norm(sum g_i)^2` | >= 1/N | rows differ (1/N: are equal) |
    | `curvature_gradient_noise/norm_{min,q25,median,q75,q95,max}` | quantiles of `norm(g_i)` | >= 0 | far maximum: outliers |
    | `curvature_gradient_noise/num_undefined_pairs` | pairs with a zero gradient, in no cosine | >= 0 | rows learnt or masked |
    | `curvature_gradient_noise_over_blocks/<metric>_{min,median,max}` | five of these of single blocks, over blocks | | |

    The five are `scale`, `covariance_trace`, `mean_gradient_norm_squared`, `mean_cosine` and `conflict_share`.

    *The scale counts rows*: at a batch of B = scale rows the noise in the batch's mean gradient, `tr Sigma / B`, equals
    `norm(G)^2`. Scaling the loss does not change it. The ratio of a single probe is never reported: its denominator was
    negative at a quarter of the probes of a small network at N = 32. Both parts are averaged over probes and then divided;
    while the average of the denominator is not positive there is no `scale`, and `metadata["absent"]` says so. At fixed rows
    the average runs over steps only, and the error of having just these rows stays.

    *Rows of different length*: where the training loss is a mean over rows its gradient is G; where it is a mean over targets,
    `sum l_i / sum n_i`, its gradient is G divided by the mean of n_i, and the ratio is the same. But the number of targets in
    a batch is taken as constant: a long row has a long gradient, and this difference counts as noise. In units of targets the
    scale is about `num_targets / num_samples` (both in the metadata) times as large.

    `kernel_drift` compares the very same rows: it is there for `draw="fixed"` and lists of microbatches, and absent for fresh
    draws, for another set of trainable parameters, and where other rows are usable than at the first probe. These are
    gradients of the loss, so residuals that change turn them as well as features do. Rows without a valid target or a finite
    gradient are left out of everything. Evaluation mode: the noise of dropout is not in Sigma.

    Args:
        decay: weight of the past in the moving averages, at least 0 and below 1; 0.9 averages about ten probes. They are free
            of the bias towards the zero they start from.

    Cost: nothing beside the Gram, which `FisherSpectrum()` needs anyway (other Fisher types have Grams of their own, at the
    cost of another), and a hash of the microbatches; state: N (N+1) / 2 floats.

    References: McCandlish, Kaplan, Amodei et al. (2018), "An empirical model of large-batch training", eq. 2.9 and A.1.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ConfigurationError(f"`decay` must be at least 0 and below 1, got {self.decay!r}.")

    @property
    def name(self) -> str:
        """`gradient_noise`, whatever the options."""
        return _NAME

    def init(self, problem: Problem) -> GradientNoiseState:
        """Empty averages, and no reference kernel to measure a drift from."""
        return {"whole": _no_averages(), "blocks": {}, "reference": None}

    def measure(self, problem: Problem, state: GradientNoiseState) -> tuple[list[Record], GradientNoiseState]:
        """One model-wide record and one a block; the state of averages and reference kernel."""
        usable = _usable(problem)
        total, blocks = _statistics(problem, usable)
        model_wide = gradient_statistics(total)
        kernel, rows_hash = half_vector(total), _fingerprint(problem, usable)
        reference = state["reference"] or {"rows": rows_hash, "step": problem.step, "kernel": kernel.tolist()}
        comparable = reference["rows"] == rows_hash
        drift = kernel_drift(kernel, torch.tensor(reference["kernel"], dtype=torch.float64)) if comparable else None
        after: GradientNoiseState = {
            "whole": self._averaged(state["whole"], model_wide),
            "blocks": {
                block: self._averaged(state["blocks"].get(block, _no_averages()), statistics)
                for block, statistics in blocks.items()
            },
            "reference": reference,
        }
        metadata = {**_settings(problem, usable), "decay": self.decay, "reference_step": reference["step"]}
        why_no_drift = "a kernel is zero" if comparable else "not the rows and parameters of the first probe"
        first = _model_record(problem, model_wide, after["whole"], drift, why_no_drift, metadata)
        return [first, *(_block_record(problem, block, blocks[block], after["blocks"][block]) for block in blocks)], after

    def _averaged(self, averages: _Averages, statistics: GradientStatistics) -> _Averages:
        past, new = self.decay, 1.0 - self.decay
        return {
            "weight": past * averages["weight"] + new,
            "covariance_trace": past * averages["covariance_trace"] + new * statistics.covariance_trace,
            "mean_gradient_norm_squared": (
                past * averages["mean_gradient_norm_squared"] + new * statistics.mean_gradient_norm_squared
            ),
        }


def _no_averages() -> _Averages:
    return {"weight": 0.0, "covariance_trace": 0.0, "mean_gradient_norm_squared": 0.0}


def _usable(problem: Problem) -> Tensor:
    """(N,) on CPU: whether a sample has a valid target and a finite gradient."""
    block_grams = problem.grams()
    usable = (block_grams.num_targets > 0).cpu() & finite_samples(block_grams.grams)
    if usable.sum() < 2:
        raise ProbeError(
            f"{int(usable.sum())} of {len(usable)} samples of this probe have a valid target and a finite gradient: gradient "
            "noise needs two."
        )
    return usable


def _statistics(problem: Problem, usable: Tensor) -> tuple[Tensor, dict[str, GradientStatistics]]:
    """The model-wide Gram over the usable samples, and the statistics of every block; one block's copy at a time."""
    indices = usable.nonzero()[:, 0].to(problem.objective.device)
    total = torch.zeros(len(indices), len(indices), dtype=torch.float64, device=indices.device)
    blocks = {}
    for block, gram in problem.grams().grams.items():
        K = gram[indices][:, indices]
        total += K
        blocks[block] = gradient_statistics(K)
    return total, blocks


def _settings(problem: Problem, usable: Tensor) -> dict[str, Any]:
    return {
        "sample_unit": "sequence",
        "batch_size_unit": "rows",
        "num_samples_requested": len(usable),
        "num_samples": int(usable.sum()),
        "num_targets": int(problem.grams().num_targets.cpu()[usable].sum()),
        "dtype": dtype_name(problem.objective.dtype),
        "seed": problem.seed,
    }


def _model_record(
    problem: Problem,
    statistics: GradientStatistics,
    averages: _Averages,
    drift: float | None,
    why_no_drift: str,
    metadata: Mapping[str, Any],
) -> Record:
    values = _common(statistics, averages) | {
        "kernel_drift": drift,
        "diversity": statistics.diversity,
        "mean_gradient_norm_squared_standard_error": statistics.standard_error,
    }
    reasons = {
        "scale": _NO_SIGNAL,
        "mean_cosine": _NO_PAIRS,
        "conflict_share": _NO_PAIRS,
        "kernel_drift": why_no_drift,
        "diversity": "the gradients cancel",
        "mean_gradient_norm_squared_standard_error": "two samples have none",
    }
    averaged = {
        f"{name}_average": averages[name] / averages["weight"] for name in ("covariance_trace", "mean_gradient_norm_squared")
    }
    counts = {"num_undefined_pairs": float(statistics.num_undefined_pairs), "num_samples": float(statistics.num_samples)}
    return Record(
        step=problem.step,
        measurement=_NAME,
        scalars={**_defined(values), **averaged, **statistics.norm_quantiles(), **counts},
        headline=_HEADLINE,
        untagged=("num_samples",),
        arrays={"norms": statistics.norms.tolist()},
        charts={},
        metadata={**metadata, "absent": {name: reasons[name] for name, value in values.items() if value is None}},
    )


def _block_record(problem: Problem, block: str, statistics: GradientStatistics, averages: _Averages) -> Record:
    values = _defined(_common(statistics, averages))
    return Record(step=problem.step, measurement=_NAME, block=block, scalars=values, curves=())


def _common(statistics: GradientStatistics, averages: _Averages) -> dict[str, float | None]:
    """The metrics that a block and the model both have; None where undefined."""
    return {
        "scale": _ratio(averages),
        "covariance_trace": statistics.covariance_trace,
        "mean_gradient_norm_squared": statistics.mean_gradient_norm_squared,
        "mean_cosine": statistics.mean_cosine,
        "conflict_share": statistics.conflict_share,
    }


def _ratio(averages: _Averages) -> float | None:
    signal = averages["mean_gradient_norm_squared"]
    return averages["covariance_trace"] / signal if signal > 0 else None


def _defined(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _fingerprint(problem: Problem, usable: Tensor) -> str:
    """SHA-1 of what a kernel depends on beside the parameters' values: their names, the rows' bytes, which rows were used.

    The kernel is of the rows of all processes, and so is the hash: it is the same on all, as a checkpoint has that of one only.
    """
    digest = hashlib.sha1(repr((list(problem.objective.parameters), usable.tolist())).encode())

    def add(tensor: Tensor) -> Tensor:
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        # The tensor's own memory: NumPy, the usual way to its bytes, is not a dependency.
        digest.update((ctypes.c_char * len(flat)).from_address(flat.data_ptr()))
        return tensor

    for batch in problem.microbatches:
        map_tensors(batch, add)
    digests = problem.world.gathered(digest.hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha1(repr(digests).encode()).hexdigest()
