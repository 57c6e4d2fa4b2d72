"""Spectra of per-sample gradients that the user computed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from curvature_callbacks.batches import dtype_name
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.isolation.model import deterministic_algorithms
from curvature_callbacks.linalg.accumulate import gram
from curvature_callbacks.measurements.fisher_spectrum import FisherSpectrum, settings_of
from curvature_callbacks.model.blocks import BlockStructure, group_blocks
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.statistics.fisher_spectra import FisherSpectra, fisher_spectra

PerSampleGradients = Sequence[Mapping[str, Tensor]]


def spectra_of_gradients(
    model: nn.Module,
    gradients: PerSampleGradients,
    structure: BlockStructure,
    params_filter: ParamsFilter | None,
    options: FisherSpectrum,
) -> FisherSpectra:
    """Spectra of gradients the user already has; parameters missing from them are left out."""
    if options.fisher_type != EMPIRICAL or options.max_params_per_block is not None or options.memory_budget is not None:
        raise ConfigurationError(
            "`precomputed_gradients` are what they are: leave `fisher`, `sample_unit`, `num_draws`, `num_targets`, "
            "`max_params_per_block` and `memory_budget` at their defaults."
        )
    sizes = _measured_sizes(model, gradients, params_filter)
    first = gradients[0][next(iter(sizes))] if sizes else torch.zeros(0)
    blocks = group_blocks(model, list(sizes), structure) if sizes else {}
    with deterministic_algorithms(first.device, enabled=options.deterministic):
        given = _as_samples(gradients, blocks, sizes, first.dtype)
        precomputed = {"fisher": "precomputed", "sample_unit": "precomputed", "dtype": dtype_name(first.dtype)}
        return fisher_spectra(given, options, settings_of(options) | precomputed)


def _measured_sizes(model: nn.Module, gradients: PerSampleGradients, params_filter: ParamsFilter | None) -> dict[str, int]:
    """Number of elements of each trainable parameter that every sample has a gradient of."""
    trainable = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (params_filter is None or params_filter(name, parameter))
    }
    names = [name for name in trainable if gradients and name in gradients[0]]
    if gradients and not names:
        raise ConfigurationError(
            "`precomputed_gradients` names no trainable parameter of the model: keys must be as in `named_parameters()`."
        )
    for number, sample in enumerate(gradients):
        for name in names:
            if name not in sample or sample[name].numel() != trainable[name]:
                raise ConfigurationError(
                    f"`precomputed_gradients` must give every sample the same parameters in their sizes: sample {number} does "
                    f"not for `{name}`."
                )
    return {name: trainable[name] for name in names}


def _as_samples(
    gradients: PerSampleGradients, blocks: Mapping[str, Sequence[str]], sizes: Mapping[str, int], dtype: torch.dtype
) -> BlockGrams:
    """Grams of the gradients, each taken as that of a row with one target."""
    N = len(gradients)
    return BlockGrams(
        grams={block: _gram_of(gradients, members) for block, members in blocks.items()},
        sizes={block: sum(sizes[name] for name in members) for block, members in blocks.items()},
        samples=torch.arange(N),
        weights=torch.ones(N, dtype=torch.float64),
        num_targets=torch.ones(N, dtype=torch.int64),
        dtype=dtype,
    )


def _gram_of(gradients: PerSampleGradients, names: Sequence[str]) -> Tensor:
    return torch.stack([gram(torch.stack([_flat(sample[name]) for sample in gradients])) for name in names]).sum(0)


def _flat(gradient: Tensor) -> Tensor:
    return gradient.flatten() if gradient.dtype == torch.float64 else gradient.flatten().float()
