"""BlockGrams: the result of a probe's passes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.linalg.kronecker import LayerKronecker
from curvature_callbacks.model.blocks import Blocks
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.model.objective import Objective


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockGrams:
    """Grams of one probe over S pseudo-samples; S = N rows for the empirical Fisher over sequences.

    Attributes:
        grams: block to (S, S) float64, unscaled, `K_st = g~_s . g~_t`, see `FisherType`.
        sizes: block to its number of parameters.
        samples: (S,) int64, the row of the probe each pseudo-sample belongs to.
        weights: (S,) float64, `g~_s = sqrt(weights_s) g_s` in the mean gradient.
        num_targets: (N,) valid targets of each row.
        dtype: what the gradients were computed in.
        operations: parameter to the operations that used it.
        fallback: parameter to why its gradients were taken row by row.
        failed_certificates: parameters among them whose fast Gram was proven wrong.
        certificate_error: largest relative error the certificate found over the parameters; None when it was not run.
        kronecker: weight to its layer's Kronecker factors; empty unless asked for.
        mode: where factors waited, see `Storage.mode`.
    """

    grams: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    samples: Tensor
    weights: Tensor
    num_targets: Tensor
    dtype: torch.dtype
    operations: Mapping[str, list[Operation]] = field(default_factory=dict)
    fallback: Mapping[str, str] = field(default_factory=dict)
    failed_certificates: tuple[str, ...] = ()
    certificate_error: float | None = None
    kronecker: Mapping[str, LayerKronecker] = field(default_factory=dict)
    mode: str = "one pass"


def among_all_rows(restricted: BlockGrams, finite: Tensor, fisher_type: FisherType, device: torch.device) -> BlockGrams:
    """Grams of the `finite` rows (N,) as those of all rows: the others are NaN where pseudo-samples are rows, else left out."""
    indices = finite.nonzero()[:, 0]
    num_targets = torch.zeros(len(finite), dtype=torch.int64).index_put((indices,), restricted.num_targets)
    samples = indices[restricted.samples]
    if fisher_type != EMPIRICAL:
        return replace(restricted, samples=samples, num_targets=num_targets)
    on_device = samples.to(device)
    unknown = _unknown(len(finite), device)
    return replace(
        restricted,
        grams={block: unknown.index_put((on_device[:, None], on_device), K) for block, K in restricted.grams.items()},
        samples=torch.arange(len(finite)),
        weights=torch.ones(len(finite), dtype=torch.float64),
        num_targets=num_targets,
    )


def without_finite_rows(objective: Objective, blocks: Blocks, num_rows: int, fallback: Mapping[str, str]) -> BlockGrams:
    """Grams of which nothing is known: no row has a finite gradient."""
    return BlockGrams(
        grams=dict.fromkeys(blocks, _unknown(num_rows, objective.device)),
        sizes=block_sizes(objective, blocks),
        dtype=objective.dtype,
        samples=torch.arange(num_rows),
        weights=torch.ones(num_rows, dtype=torch.float64),
        num_targets=torch.zeros(num_rows, dtype=torch.int64),
        fallback=fallback,
    )


def block_sizes(objective: Objective, blocks: Blocks) -> dict[str, int]:
    """Block to its number of parameters, those of all shards."""
    sizes = objective.sizes
    return {block: sum(sizes[name] for name in names) for block, names in blocks.items()}


def _unknown(num_rows: int, device: torch.device) -> Tensor:
    return torch.full((num_rows, num_rows), torch.nan, dtype=torch.float64, device=device)
