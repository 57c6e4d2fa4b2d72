"""Per-block spectrum of the empirical Fisher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final, get_args

import torch
from torch import nn

from curvature_callbacks.batches import as_microbatches, batch_size, take_rows
from curvature_callbacks.errors import ConfigurationError, ProbeError, check_choice, check_positive
from curvature_callbacks.measurements.base import offline_problem
from curvature_callbacks.measurements.fisher_spectra import (
    EigensolveDevice,
    FisherSpectra,
    PerSampleGradients,
    spectra_of_gradients,
    spectra_of_problem,
    warned,
)
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.losses import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.problem import Problem
from curvature_callbacks.record import Record

_NAME: Final = "empirical_fisher"
_HEADLINE: Final = (
    "full_condition_number",
    "full_lambda_max",
    "full_effective_rank",
    "full_trace",
    "block_diagonal_condition_number",
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FisherSpectrum:
    """Per-block empirical-Fisher spectra, exact for the drawn samples.

    Tags (`<b>`: block; `full` and `block_diagonal`: whole model, sum and union of the blocks):

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature_empirical_fisher_condition_number/<b>` | `lambda_1 / lambda_r` | >= 1 | bad scaling |
    | `curvature_empirical_fisher_lambda_max/<b>` | largest eigenvalue | >= 0 | one direction all samples push along |
    | `curvature_empirical_fisher_effective_rank/<b>` | exp of the entropy | 1..N | many directions |
    | `curvature_empirical_fisher_trace/<b>` | mean squared gradient norm | >= 0 | a large share of the gradient |
    | `curvature/empirical_fisher_full_<metric>` | the same four of the whole Fisher | | |
    | `curvature/empirical_fisher_block_diagonal_condition_number` | of its block-diagonal approximation | >= 1 | |
    | `curvature_empirical_fisher/{full,block_diagonal}_<metric>` | all other metrics of both | | |
    | `curvature_empirical_fisher_over_blocks/<metric>_{min,median,max}` | all other metrics, over blocks | | |

    Never compare `condition_number`, `rank` or `effective_rank` between runs of different N: they grow with it.

    Args:
        center_gradients: report the gradient covariance `F - g g'` instead.
        damping: delta of `condition_number_damped`, in units of the eigenvalues (1e-3, usual for K-FAC).
        eigensolve_device: where the N x N eigensolves run; `auto` is the model's device.

    Cost: see `compute_fisher_spectrum`.
    """

    center_gradients: bool = False
    damping: float = 1e-3
    eigensolve_device: EigensolveDevice = "auto"

    def __post_init__(self) -> None:
        _check_device(self.eigensolve_device)
        if not self.damping > 0:
            raise ConfigurationError(f"`damping` must be positive, got {self.damping!r}.")

    @property
    def name(self) -> str:
        """`empirical_fisher`."""
        return _NAME

    def init(self, problem: Problem) -> None:
        """No state: what the certificate proved is kept by the monitor's problems."""

    def measure(self, problem: Problem, state: None) -> tuple[list[Record], None]:
        """One record a block and one for the whole model."""
        spectra = spectra_of_problem(problem, center=self.center_gradients, device=self.eigensolve_device)
        if spectra.full.num_samples < 2:
            raise ProbeError("fewer than two samples of this probe have a finite gradient.")
        return [self._whole(problem, spectra), *self._blocks(problem, spectra)], None

    def _whole(self, problem: Problem, spectra: FisherSpectra) -> Record:
        parts = {"full": spectra.full, "block_diagonal": spectra.block_diagonal}
        return Record(
            step=problem.step,
            measurement=_NAME,
            scalars={
                f"{part}_{metric}": value
                for part, spectrum in parts.items()
                for metric, value in spectrum.metrics(damping=self.damping).items()
            },
            headline=_HEADLINE,
            arrays={f"{part}_eigenvalues": spectrum.eigenvalues.tolist() for part, spectrum in parts.items()},
            metadata={**spectra.metadata, "damping": self.damping},
        )

    def _blocks(self, problem: Problem, spectra: FisherSpectra) -> list[Record]:
        return [
            Record(
                step=problem.step,
                measurement=_NAME,
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
    block_structure: BlockStructure = "layer",
    params_filter: ParamsFilter | None = None,
    center_gradients: bool = False,
    num_samples: int | None = None,
    precomputed_gradients: PerSampleGradients | None = None,
    eigensolve_device: EigensolveDevice = "auto",
    seed: int = 0,
) -> FisherSpectra:
    """Spectra of the empirical Fisher `F = (1/N) sum_i g_i g_i'`: per block, of all of it, of its block diagonal.

    Sample i is a row; `g_i` is the gradient of its loss *summed* over its valid targets (sample unit `sequence`), with the
    model's own shift and mask. Evaluation mode (BatchNorm uses its running statistics, dropout is off). Exact: no
    subsampling of parameters, no regularisation. Samples without valid target or with a non-finite gradient are left out and
    counted.

    Args:
        model: the module; left as found.
        batches: a microbatch or a list of them. A mapping is called as `model(**batch)`, a tuple `(inputs, targets)` as
            `model(inputs)`. N spans all of them, cross terms exact.
        loss: None for the model's own `.loss`; `cross_entropy`, `mse` or `bce` for tuples (mean over rows); or
            `(model, batch) -> scalar mean | (N,) per-sample losses`.
        block_structure: `layer`, `parameter` or `none`.
        params_filter: `(name, parameter) -> bool`, which trainable parameters to measure.
        center_gradients: subtract the mean gradient: the covariance `F - g g'`.
        num_samples: use the first so many rows only; default all.
        precomputed_gradients: one mapping from parameter name to gradient per sample; `batches` and `loss` are then unused.
        eigensolve_device: `auto` (the model's device), `cpu` or `cuda`; the eigensolve is float64 everywhere.
        seed: seeds the certificate's signs.

    Returns:
        The spectra; with fewer than two usable samples a warning and empty ones.

    Raises:
        ConfigurationError: an unknown choice, an undeterminable loss, no trainable parameter, no valid target.
        RefusedError: samples are coupled, so that they have no gradients of their own.

    Cost: 1.3 to 1.8 gradients of the same rows (GPT-2 shapes, N = 8 to 64, T = 128 to 32, one CPU thread) and one more for the
    certificate; parameters without a capture rule (convolutions, fused experts) take N single-row gradients, listed in
    `metadata["fallback"]`. Memory: inputs and output gradients of all microbatches but the last, plus 64 MiB.

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
    _check_device(eigensolve_device)
    if precomputed_gradients is not None:
        return spectra_of_gradients(
            model, precomputed_gradients, block_structure, params_filter, center_gradients, eigensolve_device
        )
    microbatches = as_microbatches(batches)
    if num_samples is not None:
        check_positive("num_samples", num_samples)
        microbatches = _first_rows(microbatches, num_samples)
    with offline_problem(
        model, microbatches, loss=loss, params_filter=params_filter, block_structure=block_structure, seed=seed
    ) as problem:
        return warned(spectra_of_problem(problem, center=center_gradients, device=eigensolve_device))


def _first_rows(microbatches: Sequence[Any], count: int) -> list[Any]:
    kept = []
    for batch in microbatches:
        rows = min(batch_size(batch), count)
        if rows:
            kept.append(take_rows(batch, torch.arange(rows)))
        count -= rows
    return kept


def _check_device(device: str) -> None:
    check_choice("eigensolve_device", device, get_args(EigensolveDevice))
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("`eigensolve_device`='cuda' but no CUDA device is available: use 'auto' or 'cpu'.")
