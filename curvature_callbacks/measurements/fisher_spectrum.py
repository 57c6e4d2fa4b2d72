"""Per-block spectrum of the empirical Fisher."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

import torch
from torch import Tensor, nn

from curvature_callbacks.batches import as_microbatches, batch_size, take_rows
from curvature_callbacks.errors import ConfigurationError, ProbeError, check_choice, check_positive
from curvature_callbacks.gram.engine import finite_samples
from curvature_callbacks.linalg.accumulate import gram
from curvature_callbacks.linalg.spectrum import Spectrum, centred, spectrum_of_gram, union
from curvature_callbacks.measurements.base import offline_problem
from curvature_callbacks.model.blocks import BlockStructure, group_blocks
from curvature_callbacks.model.losses import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.problem import Problem
from curvature_callbacks.record import Record

EigensolveDevice = Literal["auto", "cpu", "cuda"]
PerSampleGradients = Sequence[Mapping[str, Tensor]]

_NAME: Final = "empirical_fisher"
_HEADLINE: Final = (
    "full_condition_number",
    "full_lambda_max",
    "full_effective_rank",
    "full_trace",
    "block_diagonal_condition_number",
)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FisherSpectra:
    """Spectra of `F = (1/N) sum_i g_i g_i'`, `g_i` the gradient of sample i's loss summed over its valid targets.

    Attributes:
        blocks: block to the spectrum of its diagonal block of F.
        full: spectrum of all of F: its Gram is the *sum* of the block Grams.
        block_diagonal: spectrum of F's block-diagonal approximation: the *union* of the block spectra. It can differ from
            `full` by O(1).
        metadata: Fisher type, sample unit, N requested and used, valid targets, dtype, seed, fallbacks, certificate.
    """

    blocks: Mapping[str, Spectrum]
    full: Spectrum
    block_diagonal: Spectrum
    metadata: Mapping[str, Any]


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
        spectra = _spectra(problem, self.center_gradients, self.eigensolve_device)
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

    Cost: 1.2 to 1.8 gradients of the same rows (GPT-2 shapes, N = 8 to 64, T = 128 to 32, one CPU thread) and one more for the
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
        return _of_gradients(model, precomputed_gradients, block_structure, params_filter, center_gradients, eigensolve_device)
    microbatches = as_microbatches(batches)
    if num_samples is not None:
        check_positive("num_samples", num_samples)
        microbatches = _first_rows(microbatches, num_samples)
    with offline_problem(
        model, microbatches, loss=loss, params_filter=params_filter, block_structure=block_structure, seed=seed
    ) as problem:
        return _warned(_spectra(problem, center_gradients, eigensolve_device))


def _spectra(problem: Problem, center: bool, device: EigensolveDevice) -> FisherSpectra:
    found = problem.block_grams
    metadata = {
        "fisher": "empirical",
        "sample_unit": "sequence",
        "num_targets": int(found.num_targets.sum()),
        "centered": center,
        "batch_norm": "eval",
        "dtype": str(problem.objective.dtype).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "seed": problem.seed,
        "step": problem.step,
        "mode": "factors",
        "fallback": dict(found.fallback),
        "certificate_error": found.certificate_error,
    }
    sizes = {
        block: sum(problem.objective.parameters[name].numel() for name in names) for block, names in problem.blocks.items()
    }
    usable = (found.num_targets > 0) & finite_samples(found.grams)
    return _of_grams(found.grams, sizes, usable, metadata, center, problem.objective.dtype, device)


def _of_gradients(
    model: nn.Module,
    gradients: PerSampleGradients,
    structure: BlockStructure,
    params_filter: ParamsFilter | None,
    center: bool,
    device: EigensolveDevice,
) -> FisherSpectra:
    """Spectra of gradients the user already has; parameters missing from them are left out."""
    trainable = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (params_filter is None or params_filter(name, parameter))
    }
    names = [name for name in trainable if gradients and name in gradients[0]]
    if gradients and not names:
        raise ConfigurationError(
            "`precomputed_gradients` names no trainable parameter of the model: keys must be as in `named_parameters()`."
        )
    blocks = group_blocks(model, names, structure) if names else {}
    grams = {block: _gram_of(gradients, members) for block, members in blocks.items()}
    sizes = {block: sum(trainable[name].numel() for name in members) for block, members in blocks.items()}
    dtype = gradients[0][names[0]].dtype if names else torch.float32
    metadata = {
        "fisher": "precomputed",
        "sample_unit": "precomputed",
        "centered": center,
        "dtype": str(dtype).removeprefix("torch."),
    }
    usable = finite_samples(grams) if grams else torch.zeros(0, dtype=torch.bool)
    return _warned(_of_grams(grams, sizes, usable, metadata, center, dtype, device))


def _gram_of(gradients: PerSampleGradients, names: Sequence[str]) -> Tensor:
    parts = [
        gram(
            torch.stack(
                [
                    sample[name].flatten().float() if sample[name].dtype != torch.float64 else sample[name].flatten()
                    for sample in gradients
                ]
            )
        )
        for name in names
    ]
    return torch.stack(parts).sum(0)


def _of_grams(
    grams: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    usable: Tensor,
    metadata: Mapping[str, Any],
    center: bool,
    dtype: torch.dtype,
    device: EigensolveDevice,
) -> FisherSpectra:
    used = int(usable.sum())
    metadata = {**metadata, "num_samples_requested": len(usable), "num_samples": used}
    if used < 2:
        empty = spectrum_of_gram(torch.zeros(0, 0), num_params=0, dtype=dtype)
        return FisherSpectra(blocks={}, full=empty, block_diagonal=empty, metadata=metadata)
    kept = {block: _rows_and_columns(K, usable) for block, K in grams.items()}
    if center:
        kept = {block: centred(K) for block, K in kept.items()}
    total = torch.stack(list(kept.values())).sum(0)
    where = None if device == "auto" else torch.device(device)
    blocks = {block: spectrum_of_gram(K, num_params=sizes[block], dtype=dtype, device=where) for block, K in kept.items()}
    full = spectrum_of_gram(total, num_params=sum(sizes.values()), dtype=dtype, device=where)
    return FisherSpectra(blocks=blocks, full=full, block_diagonal=union(blocks, dtype=dtype), metadata=metadata)


def _rows_and_columns(K: Tensor, usable: Tensor) -> Tensor:
    usable = usable.to(K.device)
    return K[usable][:, usable]


def _first_rows(microbatches: Sequence[Any], count: int) -> list[Any]:
    kept = []
    for batch in microbatches:
        rows = min(batch_size(batch), count)
        if rows:
            kept.append(take_rows(batch, torch.arange(rows)))
        count -= rows
    return kept


def _warned(spectra: FisherSpectra) -> FisherSpectra:
    used, requested = spectra.metadata["num_samples"], spectra.metadata["num_samples_requested"]
    if used < 2:
        warnings.warn(
            f"{used} of {requested} samples are usable (finite gradient, valid target) and a spectrum needs two: the result "
            "is empty.",
            stacklevel=3,
        )
    elif used < requested:
        warnings.warn(f"{requested - used} of {requested} samples were left out: no valid target or not finite.", stacklevel=3)
    return spectra


def _check_device(device: str) -> None:
    check_choice("eigensolve_device", device, get_args(EigensolveDevice))
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("`eigensolve_device`='cuda' but no CUDA device is available: use 'auto' or 'cpu'.")
