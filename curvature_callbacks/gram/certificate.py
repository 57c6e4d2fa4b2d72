"""Certificate: one more forward and backward pass that proves every parameter's Gram, the sample axis included."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.gram.rows import check_separable
from curvature_callbacks.linalg.accumulate import dot
from curvature_callbacks.model.objective import Objective, gradients

_ROUNDING: Final = 1e-8  # share of the squared gradient norm below which a parameter may be rounding: (1000 eps)^2 of float32
TOLERANCE: Final = 1e-4  # a right Gram agrees to 1e-7, a wrong sample axis misses by 0.7


def certificate_errors(
    objective: Objective, microbatches: Sequence[Any], grams: Mapping[str, Tensor], *, seed: int
) -> dict[str, float]:
    """Parameter to `| w' G G' w - ||grad sum_i w_i l_i||^2 | / tr G G'` for random balanced signs w.

    A check on the sum of gradients (w = 1) could not see a wrong sample axis, and one on whole blocks not that of a parameter
    with a small share of them. Gradients that are zero but for rounding (key biases: attention does not depend on them) are
    judged by their share of all parameters.

    Raises:
        RefusedError: the loss of the rows does not separate (only where it is known as the batch's mean).

    Cost: one gradient (two of half the batch where the loss is only known as a mean); memory P.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = [_balanced_signs(batch_size(batch), generator) for batch in microbatches]
    found = _signed_gradients(objective, microbatches, signs)
    w = torch.cat(signs).to(torch.float64)
    floor = _ROUNDING * sum(gram.diagonal().sum().item() for gram in grams.values())
    return {name: _error(gram, w, found[name].flatten(), floor) for name, gram in grams.items()}


def _error(gram: Tensor, w: Tensor, signed: Tensor, floor: float) -> float:
    w = w.to(gram.device)
    predicted, actual = (w @ gram @ w).item(), dot(signed, signed).item()
    scale = max(gram.diagonal().sum().item(), actual, floor)
    return abs(predicted - actual) / scale if scale > 0 else 0.0


def _balanced_signs(size: int, generator: torch.Generator) -> Tensor:
    signs = torch.ones(size)
    signs[torch.randperm(size, generator=generator)[: size // 2]] = -1.0
    return signs


def _signed_gradients(objective: Objective, microbatches: Sequence[Any], signs: Sequence[Tensor]) -> dict[str, Tensor]:
    leaves = objective.leaves()
    totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for batch, w in zip(microbatches, signs, strict=True):
        for name, gradient in gradients(_signed_loss(objective, batch, w, leaves), leaves).items():
            totals[name] += gradient
    return totals


def _signed_loss(objective: Objective, batch: Any, w: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    """`sum_i w_i l_i`, by halves of the batch where single losses are unknown."""
    losses = objective(batch, leaves)
    if losses.per_sample is not None:
        return losses.per_sample @ w.to(losses.per_sample)
    halves = [(sign, rows) for sign in (1.0, -1.0) if len(rows := (w == sign).nonzero()[:, 0])]
    parts = [(sign, objective(take_rows(batch, rows), leaves).total) for sign, rows in halves]
    check_separable(objective, batch, sum(float(part.detach()) for _, part in parts))
    return torch.stack([sign * part for sign, part in parts]).sum()
