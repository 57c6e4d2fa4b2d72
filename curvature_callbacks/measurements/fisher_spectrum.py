"""Per-block spectrum of a Fisher matrix: empirical, sampled or exact, of sequences or tokens."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn

from curvature_callbacks.batches import as_microbatches, batch_size, take_rows
from curvature_callbacks.errors import ConfigurationError, ProbeError, check_positive
from curvature_callbacks.measurements.base import offline_problem
from curvature_callbacks.measurements.fisher_spectra import (
    EigensolveDevice,
    FisherSpectra,
    SpectrumOptions,
    failed_certificates,
    warned,
    warning_of,
)
from curvature_callbacks.measurements.gradient_sources import PerSampleGradients, spectra_of_gradients, spectra_of_problem
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.losses import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.surrogates import Fisher, FisherType, SampleUnit
from curvature_callbacks.problem import Problem
from curvature_callbacks.record import Record

_HEADLINE: Final = (
    "full_condition_number",
    "full_lambda_max",
    "full_effective_rank",
    "full_trace",
    "block_diagonal_condition_number",
)

_logger = logging.getLogger("curvature_callbacks")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FisherSpectrum:
    """Per-block spectra of a Fisher matrix, exact for the drawn samples.

    Tags (`<b>`: block; `full` and `block_diagonal`: whole model, sum and union of the blocks). `<f>` names the type, so that
    no two are ever mistaken for one another: `empirical_fisher` (the default), `sampled_fisher` and `exact_fisher` of rows,
    `empirical_fisher_token`, `sampled_fisher_token` and `exact_fisher_token` of single targets:

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature_<f>_condition_number/<b>` | `lambda_1 / lambda_r` | >= 1 | bad scaling |
    | `curvature_<f>_lambda_max/<b>` | largest eigenvalue | >= 0 | one direction all samples push along |
    | `curvature_<f>_effective_rank/<b>` | exp of the entropy | 1..N | many directions |
    | `curvature_<f>_trace/<b>` | mean squared gradient norm | >= 0 | a large share of the gradient |
    | `curvature/<f>_full_<metric>` | the same four of the whole Fisher | | |
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
        self._options()
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
        """The parameters whose failed certificate has been reported: none. What it proved is kept by the monitor's problems."""
        return ()

    def measure(self, problem: Problem, state: tuple[str, ...]) -> tuple[list[Record], tuple[str, ...]]:
        """One record a block and one for the whole model."""
        spectra = spectra_of_problem(problem, self._options())
        if spectra.full.num_samples < 2:
            raise ProbeError("fewer than two samples of this probe have a finite gradient.")
        failed = [name for name in failed_certificates(spectra) if name not in state]
        if failed:
            _logger.warning("%s: %s This is said once.", self.name, warning_of(failed))
        return [self._whole(problem, spectra), *self._blocks(problem, spectra)], (*state, *failed)

    def _options(self) -> SpectrumOptions:
        return SpectrumOptions(
            kind=self.fisher_type,
            center_gradients=self.center_gradients,
            max_params_per_block=self.max_params_per_block,
            max_sample_grad_norm=self.max_sample_grad_norm,
            memory_budget=self.memory_budget,
            eigensolve_device=self.eigensolve_device,
            deterministic=self.deterministic,
        )

    def _whole(self, problem: Problem, spectra: FisherSpectra) -> Record:
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
            arrays={f"{part}_eigenvalues": spectrum.eigenvalues.tolist() for part, spectrum in parts.items()},
            metadata={**spectra.metadata, "damping": self.damping},
        )

    def _blocks(self, problem: Problem, spectra: FisherSpectra) -> list[Record]:
        return [
            Record(
                step=problem.step,
                measurement=self.name,
                block=block,
                scalars=spectrum.metrics(damping=self.damping),
                arrays={"eigenvalues": spectrum.eigenvalues.tolist()},
                metadata={"num_params": spectrum.num_params, "jitter": spectrum.jitter},
            )
            for block, spectrum in spectra.blocks.items()
        ]


def compute_fisher_spectrum(
    model: nn.Module,
    batches: Any,
    *,
    loss: Loss = None,
    fisher: Fisher = "empirical",
    sample_unit: SampleUnit = "sequence",
    num_draws: int = 1,
    num_targets: int = 8,
    block_structure: BlockStructure = "layer",
    params_filter: ParamsFilter | None = None,
    center_gradients: bool = False,
    num_samples: int | None = None,
    precomputed_gradients: PerSampleGradients | None = None,
    max_params_per_block: int | None = None,
    max_sample_grad_norm: float | None = None,
    memory_budget: int | None = None,
    eigensolve_device: EigensolveDevice = "auto",
    deterministic: bool = False,
    seed: int = 0,
) -> FisherSpectra:
    """Spectra of a Fisher matrix, by default `F = (1/N) sum_i g_i g_i'`: per block, of all of it, of its block diagonal.

    Sample i is a row; `g_i` is the gradient of its loss *summed* over its `n_i` valid targets (sample unit `sequence`), with
    the model's own shift and mask. `token`: `F = sum_it g_it g_it' / sum_i n_i` over single targets. With labels drawn from
    the model's own predictive (`sampled`) or in expectation over it (`exact`) instead of the given ones; the exact Fisher of
    tokens is the GGN of the mean loss. Evaluation mode (BatchNorm uses its running statistics, dropout is off). No
    regularisation. Rows without valid target or with a non-finite gradient are left out and counted.

    Args:
        model: the module; left as found.
        batches: a microbatch or a list of them. A mapping is called as `model(**batch)`, a tuple `(inputs, targets)` as
            `model(inputs)`. N spans all of them, cross terms exact.
        loss: None for the model's own `.loss`; `cross_entropy`, `mse` or `bce` for tuples (mean over rows); or
            `(model, batch) -> scalar mean | (N,) per-sample losses`.
        fisher: `empirical`, `sampled` or `exact`; the last two need a loss whose likelihood is known: the model's own in a
            standard form, or a named one.
        sample_unit: `sequence` or `token`.
        num_draws: label draws per sample, for `sampled`.
        num_targets: targets drawn per row without replacement, for the `token` unit of `empirical` and `sampled`; unbiased,
            and exact where it reaches `n_i`.
        block_structure: `layer`, `component`, `module`, `parameter`, `none`, `{block: [names]}` or a function; see
            `group_blocks`.
        params_filter: `(name, parameter) -> bool`, which trainable parameters to measure.
        center_gradients: subtract the mean gradient: the covariance `F - g g'`.
        num_samples: use the first so many rows only; default all.
        precomputed_gradients: one mapping from parameter name to gradient per sample; `batches` and `loss` are then unused.
        max_params_per_block: most parameters of a block to use, in whole rows of the first axis drawn at random (at least one
            a parameter), the same for all samples, the trace rescaled so that it stays unbiased; default all.
        max_sample_grad_norm: scale gradients longer than this (over all parameters) down to it; default none. Not for `exact`.
        memory_budget: bytes on the model's device for the factors of all microbatches but the last; default 2 GiB on a CPU,
            half of what is free on an accelerator. What does not fit goes to the host (half of its free memory), and what
            does not fit there is captured in further rounds over the microbatches: the same numbers, another gradient a round.
        eigensolve_device: `auto` (the model's device), `cpu` or `cuda`; the eigensolve is float64 everywhere.
        deterministic: use PyTorch's deterministic algorithms inside, restored after; the same bits run to run. CUDA needs the
            environment variable `CUBLAS_WORKSPACE_CONFIG=:4096:8`.
        seed: seeds labels, targets and parameters drawn, and the certificate's weights.

    Returns:
        The spectra; with fewer than two usable samples a warning and empty ones. A warning also where rows were left out, or
        where a fast Gram was proven wrong and computed row by row.

    Raises:
        ConfigurationError: an unknown choice, an undeterminable loss, no trainable parameter, no valid target; a loss without
            known targets or likelihood where these are needed, an exact Fisher of more than 1024 passes.
        RefusedError: samples are coupled, so that they have no gradients of their own.

    Cost: 0.95 to 1.4 gradients of the same rows on transformers of width 192 and more (one CPU thread;
    benchmarks/results/fisher.json has these and dearer cases), two to three more where the layout of the model is not
    certified yet; parameters without a capture rule take N single-row gradients, listed in `metadata["fallback"]`. One more
    backward pass for every further draw and target, for `exact` for every position and class, and an eigensolve of all
    their gradients together. Small microbatches cost less than a pass each: after the first, those of equal shapes are run
    together up to 8 MiB of inputs and output gradients. Memory: inputs and
    output gradients of all passes but the last within `memory_budget`; 32 MiB of gradients at a time (80 MiB for convolutions,
    at most 256 MiB for parameters that go row by row, are used through computed copies or through views that overlap); `8 S^2`
    bytes a parameter for S pseudo-samples. A loss that is only known as a mean takes one more forward pass over every row.

    References: Kunstner, Balles and Hennig (2019), "Limitations of the empirical Fisher approximation".

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> spectra = compute_fisher_spectrum(model, (x, y), loss="cross_entropy", block_structure="none")
        >>> gradients = [
        ...     torch.cat([g.flatten() for g in torch.autograd.grad(
        ...         torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))])
        ...     for i in range(8)
        ... ]
        >>> dense = sum(torch.outer(g, g) for g in gradients) / 8
        >>> torch.allclose(spectra.full.eigenvalues[0].float(), torch.linalg.eigvalsh(dense)[-1], rtol=1e-4)
        True
    """
    options = SpectrumOptions(
        kind=FisherType(fisher=fisher, sample_unit=sample_unit, num_draws=num_draws, num_targets=num_targets),
        center_gradients=center_gradients,
        max_params_per_block=max_params_per_block,
        max_sample_grad_norm=max_sample_grad_norm,
        memory_budget=memory_budget,
        eigensolve_device=eigensolve_device,
        deterministic=deterministic,
    )
    if precomputed_gradients is not None:
        precomputed_gradients = precomputed_gradients[:num_samples]
        return warned(spectra_of_gradients(model, precomputed_gradients, block_structure, params_filter, options))
    microbatches = as_microbatches(batches)
    if num_samples is not None:
        check_positive("num_samples", num_samples)
        microbatches = _first_rows(microbatches, num_samples)
    with offline_problem(
        model, microbatches, loss=loss, params_filter=params_filter, block_structure=block_structure, seed=seed
    ) as problem:
        return warned(spectra_of_problem(problem, options))


def _first_rows(microbatches: Sequence[Any], count: int) -> list[Any]:
    kept = []
    for batch in microbatches:
        rows = min(batch_size(batch), count)
        if rows:
            kept.append(take_rows(batch, torch.arange(rows)))
        count -= rows
    return kept
