"""FisherSpectra: per-block, full and block-diagonal spectra of weighted gradients, from their Grams."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor

from curvature_callbacks.linalg.accumulate import finite_samples
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.statistics.spectrum import Spectrum, spectrum_of_gram, union

EigensolveDevice = Literal["auto", "cpu", "cuda"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FisherSpectra:
    """Spectra of a Fisher `F = sum_s g_s g_s' / normaliser`; of the empirical one of rows `F = (1/N) sum_i g_i g_i'`.

    Attributes:
        blocks: block to the spectrum of its diagonal block of F.
        full: spectrum of all of F: its Gram is the *sum* of the block Grams.
        block_diagonal: spectrum of F's block-diagonal approximation: the *union* of the block spectra. It can differ from
            `full` by O(1).
        metadata: Fisher type, sample unit, N (rows) requested and used, valid targets, dtype, seed, fallbacks, certificate.
        failed_certificates: parameters whose fast Gram was proven wrong, so that their gradients were taken row by row.
    """

    blocks: Mapping[str, Spectrum]
    full: Spectrum
    block_diagonal: Spectrum
    metadata: Mapping[str, Any]
    failed_certificates: tuple[str, ...] = ()


class SpectrumOptions(Protocol):
    """The options that `fisher_spectra` reads: those of the measurement `FisherSpectrum`, which explains and checks them."""

    @property
    def fisher_type(self) -> FisherType:
        """Which Fisher, and so by what the sum of outer products is divided."""
        ...

    @property
    def center_gradients(self) -> bool:
        """Whether the mean gradient is subtracted."""
        ...

    @property
    def max_sample_grad_norm(self) -> float | None:
        """Norm that longer gradients are scaled down to."""
        ...

    @property
    def eigensolve_device(self) -> EigensolveDevice:
        """Where the eigensolves run; `auto` is where the Grams are."""
        ...


class WeightedGradients(Protocol):
    """S gradients `sqrt(w_s) g_s` of N rows, by their block Grams: what `fisher_spectra` reads of `gram.result.BlockGrams`."""

    @property
    def grams(self) -> Mapping[str, Tensor]:
        """Block to (S, S), unscaled."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Block to its number of parameters."""
        ...

    @property
    def samples(self) -> Tensor:
        """(S,) the row, 0 to N - 1, each gradient belongs to."""
        ...

    @property
    def weights(self) -> Tensor:
        """(S,) `w_s`."""
        ...

    @property
    def num_targets(self) -> Tensor:
        """(N,) valid targets of each row."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the gradients were computed in."""
        ...

    @property
    def failed_certificates(self) -> tuple[str, ...]:
        """Parameters whose fast Gram was proven wrong; see `FisherSpectra`."""
        ...


def fisher_spectra(gradients: WeightedGradients, options: SpectrumOptions, metadata: Mapping[str, Any]) -> FisherSpectra:
    """Spectra over the rows with a valid target and finite gradients only; empty ones of fewer than two gradients."""
    usable = _usable_rows(gradients)
    indices = usable[gradients.samples.cpu()].nonzero()[:, 0]
    metadata = {
        **metadata,
        "num_samples_requested": len(usable),
        "num_samples": int(usable.sum()),
        "num_gradients": len(indices),
        "num_targets": int(gradients.num_targets.cpu()[usable].sum()),
    }
    failed = gradients.failed_certificates
    if len(indices) < 2:
        empty = spectrum_of_gram(torch.zeros(0, 0), num_params=0, dtype=gradients.dtype)
        return FisherSpectra(blocks={}, full=empty, block_diagonal=empty, metadata=metadata, failed_certificates=failed)
    grams = {block: K[indices.to(K.device)][:, indices.to(K.device)] for block, K in gradients.grams.items()}
    weights = gradients.weights.cpu()[indices]
    if options.max_sample_grad_norm is not None:
        grams, metadata["num_clipped"] = _clipped(grams, weights, options.max_sample_grad_norm)
    solve = partial(
        spectrum_of_gram,
        dtype=gradients.dtype,
        normaliser=options.fisher_type.normaliser(gradients.num_targets.cpu()[usable]),
        weights=weights,
        samples=gradients.samples.cpu()[indices],
        center=options.center_gradients,
        device=None if options.eigensolve_device == "auto" else torch.device(options.eigensolve_device),
    )
    blocks = {block: solve(K, num_params=gradients.sizes[block]) for block, K in grams.items()}
    full = solve(_sum_of_blocks(grams), num_params=sum(gradients.sizes.values()))
    return FisherSpectra(
        blocks=blocks,
        full=full,
        block_diagonal=union(blocks, dtype=gradients.dtype),
        metadata=metadata,
        failed_certificates=failed,
    )


def warning_of(failed: Sequence[str]) -> str:
    """The sentence that reports `failed_certificates`."""
    return (
        f"the fast Gram of {', '.join(f'`{name}`' for name in failed)} failed its certificate: the gradients of these "
        "parameters are taken row by row, which is exact and slow."
    )


def warned(spectra: FisherSpectra) -> FisherSpectra:
    """`spectra`, with a warning when samples were left out or a certificate failed."""
    if spectra.failed_certificates:
        warnings.warn(warning_of(spectra.failed_certificates), stacklevel=3)
    used, requested = spectra.metadata["num_samples"], spectra.metadata["num_samples_requested"]
    if spectra.full.num_samples < 2:
        warnings.warn(
            f"{used} of {requested} samples are usable (finite gradient, valid target) and a spectrum needs two: the result "
            "is empty.",
            stacklevel=3,
        )
    elif used < requested:
        warnings.warn(f"{requested - used} of {requested} samples were left out: no valid target or not finite.", stacklevel=3)
    return spectra


def _usable_rows(gradients: WeightedGradients) -> Tensor:
    """(N,) on CPU: rows with a valid target and gradients, none of them infinite or NaN in any block."""
    rows = gradients.samples.cpu()
    usable = torch.zeros(len(gradients.num_targets), dtype=torch.bool)
    usable[rows] = True
    if gradients.grams:
        usable[rows[~finite_samples(gradients.grams)]] = False
    return usable & (gradients.num_targets.cpu() > 0)


def _clipped(grams: Mapping[str, Tensor], weights: Tensor, norm: float) -> tuple[dict[str, Tensor], int]:
    """The Grams of `g_s min(1, norm / ||g_s||)`, the norm over all blocks, and how many gradients that shortens."""
    total = _sum_of_blocks(grams).diagonal()
    factors = (norm * (weights.to(total) / total).sqrt()).clamp(max=1.0)
    return {block: K * torch.outer(factors, factors) for block, K in grams.items()}, int((factors < 1.0).sum())


def _sum_of_blocks(grams: Mapping[str, Tensor]) -> Tensor:
    first, *others = grams.values()
    total = first.clone()
    for K in others:
        total += K
    return total
