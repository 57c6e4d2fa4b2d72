"""FisherSpectra: per-block, full and block-diagonal spectra from Grams or from gradients the user has."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.gram.engine import finite_samples
from curvature_callbacks.linalg.accumulate import gram
from curvature_callbacks.linalg.spectrum import Spectrum, centred, spectrum_of_gram, union
from curvature_callbacks.model.blocks import BlockStructure, group_blocks
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.problem import Problem

EigensolveDevice = Literal["auto", "cpu", "cuda"]
PerSampleGradients = Sequence[Mapping[str, Tensor]]


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


def spectra_of_problem(problem: Problem, *, center: bool, device: EigensolveDevice) -> FisherSpectra:
    """Spectra of a probe. Cost: see `compute_fisher_spectrum`."""
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


def spectra_of_gradients(
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
    return warned(_of_grams(grams, sizes, usable, metadata, center, dtype, device))


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


def warned(spectra: FisherSpectra) -> FisherSpectra:
    """`spectra`, with a warning when samples were left out."""
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
