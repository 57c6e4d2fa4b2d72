"""Per-block spectrum of a Fisher matrix: empirical, sampled or exact, of sequences or tokens."""

import logging
from dataclasses import dataclass
from typing import Any, Final, final, get_args

import torch

from curvature_callbacks.batches import dtype_name
from curvature_callbacks.errors import ConfigurationError, ProbeError, check_choice, check_positive
from curvature_callbacks.isolation.model import deterministic_algorithms
from curvature_callbacks.model.loss.fisher_type import Fisher, FisherType, SampleUnit
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import Record
from curvature_callbacks.statistics.fisher_spectra import (
    EigensolveDevice,
    FisherSpectra,
    fisher_spectra,
    warning_of,
)

_HEADLINE: Final = (
    "full_condition_number",
    "full_lambda_max",
    "full_effective_rank",
    "full_trace",
    "block_diagonal_condition_number",
)
_CURVES: Final = ("condition_number", "lambda_max", "effective_rank", "trace")

_logger = logging.getLogger("curvature_callbacks")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FisherSpectrum:
    """Per-block spectra of a Fisher matrix, exact for the drawn samples.

    Tags (`<b>`: block; `full` and `block_diagonal`: the model, sum and union of its blocks). `<f>` names the type, so that
    no two are ever mistaken for one another: `empirical_fisher` (the default), `sampled_fisher` and `exact_fisher` of rows,
    `empirical_fisher_token`, `sampled_fisher_token` and `exact_fisher_token` of single targets:

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature_<f>_condition_number/<b>` | `lambda_1 / lambda_r` | >= 1 | bad scaling |
    | `curvature_<f>_lambda_max/<b>` | largest eigenvalue | >= 0 | one direction all samples push along |
    | `curvature_<f>_effective_rank/<b>` | exp of the entropy | 1..N | many directions |
    | `curvature_<f>_trace/<b>` | mean squared gradient norm | >= 0 | a large share of the gradient |
    | `curvature/<f>_full_<metric>` | the same four of the Fisher of all parameters | | |
    | `curvature/<f>_block_diagonal_condition_number` | of its block-diagonal approximation | >= 1 | |
    | `curvature_<f>/{full,block_diagonal}_<metric>` | all other metrics of both | | |
    | `curvature_<f>/num_clipped` | gradients `max_sample_grad_norm` shortened, where it is set | 0..N | outliers |
    | `curvature_<f>_over_blocks/<metric>_{min,median,max}` | all other metrics, over blocks | | |

    Never compare `condition_number`, `rank` or `effective_rank` between runs of different N: they grow with it. N counts
    gradients: rows, or one for every target, draw and class of them.

    Args:
        fisher: where labels come from: `empirical` (given), `sampled` (drawn from the model's own predictive) or `exact` (the
            expectation over it; one backward pass for every position and class, so for few classes).
        sample_unit: `sequence` (`g_i` of a row's loss summed over its targets, mean over rows) or `token` (of a single
            target's loss, mean over targets).
        num_draws: label draws per sample, for `sampled`.
        num_targets: targets drawn per row, for the `token` unit of `empirical` and `sampled`; unbiased, and exact where it
            reaches the row's number of valid targets.
        center_gradients: report the gradient covariance `F - g g'` instead.
        damping: delta of `condition_number_damped`, in units of the eigenvalues (1e-3, usual for K-FAC).
        max_params_per_block: most parameters of a block to use, drawn at random, the same for all samples, the trace rescaled;
            default all.
        max_sample_grad_norm: longer gradients are scaled down to this norm over all parameters before anything else; default
            none. The numbers are then those of the clipped gradients.
        memory_budget: bytes on the model's device for the factors of earlier microbatches; see `compute_fisher_spectrum`.
        eigensolve_device: where the N x N eigensolves run; `auto` is the model's device.
        deterministic: use PyTorch's deterministic algorithms inside the probe, for the same bits run to run.

    Cost: see `compute_fisher_spectrum`.
    """

    fisher: Fisher = "empirical"
    sample_unit: SampleUnit = "sequence"
    num_draws: int = 1
    num_targets: int = 8
    center_gradients: bool = False
    damping: float = 1e-3
    max_params_per_block: int | None = None
    max_sample_grad_norm: float | None = None
    memory_budget: int | None = None
    eigensolve_device: EigensolveDevice = "auto"
    deterministic: bool = False

    def __post_init__(self) -> None:
        _ = self.fisher_type  # which checks its options
        check_choice("eigensolve_device", self.eigensolve_device, get_args(EigensolveDevice))
        if self.eigensolve_device == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("`eigensolve_device`='cuda' but no CUDA device is available: use 'auto' or 'cpu'.")
        if self.max_params_per_block is not None:
            check_positive("max_params_per_block", self.max_params_per_block)
        if self.memory_budget is not None:
            check_positive("memory_budget", self.memory_budget)
        if self.max_sample_grad_norm is not None:
            self._check_clipping(self.max_sample_grad_norm)
        if not self.damping > 0:
            raise ConfigurationError(f"`damping` must be positive, got {self.damping!r}.")

    @property
    def name(self) -> str:
        """`<fisher>_fisher`, with `_token` behind it for that unit."""
        return self.fisher_type.name

    @property
    def fisher_type(self) -> FisherType:
        """The Fisher whose spectra these are."""
        return FisherType(
            fisher=self.fisher, sample_unit=self.sample_unit, num_draws=self.num_draws, num_targets=self.num_targets
        )

    def init(self, problem: Problem) -> tuple[str, ...]:
        """The parameters whose failed certificate has been reported: none yet."""
        return ()

    def measure(self, problem: Problem, state: tuple[str, ...]) -> tuple[list[Record], tuple[str, ...]]:
        """One model-wide record, and one a block."""
        spectra = spectra_of_problem(problem, self)
        if spectra.full.num_samples < 2:
            raise ProbeError(
                "a probe of a single row has no spectrum: draw more rows (`num_microbatches`, `microbatch_size`)."
                if problem.num_rows < 2
                else "fewer than two samples of this probe have a finite gradient."
            )
        failed = [name for name in spectra.failed_certificates if name not in state]
        if failed:
            _logger.warning("%s: %s This is said once.", self.name, warning_of(failed))
        return [self._model_record(problem, spectra), *self._block_records(problem, spectra)], (*state, *failed)

    def _check_clipping(self, norm: float) -> None:
        if not norm > 0:
            raise ConfigurationError(f"`max_sample_grad_norm` must be positive, got {norm!r}.")
        if self.fisher == "exact":
            raise ConfigurationError(
                "`max_sample_grad_norm` clips gradients of labels, and an exact Fisher has none: use 'sampled'."
            )

    def _model_record(self, problem: Problem, spectra: FisherSpectra) -> Record:
        parts = {"full": spectra.full, "block_diagonal": spectra.block_diagonal}
        clipped = {"num_clipped": float(spectra.metadata["num_clipped"])} if self.max_sample_grad_norm is not None else {}
        return Record(
            step=problem.step,
            measurement=self.name,
            scalars={
                f"{part}_{metric}": value
                for part, spectrum in parts.items()
                for metric, value in spectrum.metrics(damping=self.damping).items()
            }
            | clipped,
            headline=_HEADLINE,
            untagged=tuple(f"{part}_num_samples" for part in parts),
            arrays={f"{part}_eigenvalues": spectrum.eigenvalues.tolist() for part, spectrum in parts.items()},
            charts={f"{part}_eigenvalues": "histogram" for part in parts},
            metadata={**spectra.metadata, "damping": self.damping},
        )

    def _block_records(self, problem: Problem, spectra: FisherSpectra) -> list[Record]:
        return [
            Record(
                step=problem.step,
                measurement=self.name,
                block=block,
                scalars=spectrum.metrics(damping=self.damping),
                curves=_CURVES,
                untagged=("num_samples",),
                ranked_by="condition_number",
                arrays={"eigenvalues": spectrum.eigenvalues.tolist()},
                charts={"eigenvalues": "histogram"},
                metadata={"num_params": spectrum.num_params, "jitter": spectrum.jitter},
            )
            for block, spectrum in spectra.blocks.items()
        ]


def spectra_of_problem(problem: Problem, options: FisherSpectrum) -> FisherSpectra:
    """Spectra of a probe. Cost: see `compute_fisher_spectrum`."""
    objective = problem.objective
    with deterministic_algorithms(objective.device, enabled=options.deterministic):
        grams = problem.grams(
            options.fisher_type, max_params_per_block=options.max_params_per_block, memory_budget=options.memory_budget
        )
        metadata = {
            **settings_of(options),
            "batch_norm": "eval",
            "dtype": dtype_name(objective.dtype),
            "seed": problem.seed,
            "step": problem.step,
            "mode": grams.mode,
            "fallback": dict(grams.fallback),
            "certificate_error": grams.certificate_error,
        }
        return fisher_spectra(grams, options, metadata)


def settings_of(options: FisherSpectrum) -> dict[str, Any]:
    """The options that had an effect on the result, for its metadata."""
    drawn = {"num_draws": options.num_draws} if options.fisher == "sampled" else {}
    if options.sample_unit == "token" and options.fisher != "exact":
        drawn["num_targets_per_row"] = options.num_targets
    limits = {"max_params_per_block": options.max_params_per_block, "max_sample_grad_norm": options.max_sample_grad_norm}
    return {
        "fisher": options.fisher,
        "sample_unit": options.sample_unit,
        **drawn,
        "centered": options.center_gradients,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **{name: value for name, value in limits.items() if value is not None},
    }
