"""Certificate: one more forward and backward pass that proves every parameter's Gram, the sample axis included."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from curvature_callbacks.gram.context import GramContext
from curvature_callbacks.gram.memory import Signature
from curvature_callbacks.gram.passed import Passed
from curvature_callbacks.gram.row_by_row import check_separable
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.linalg.accumulate import dot
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.gradients import gradients
from curvature_callbacks.model.loss.surrogates import Surrogate
from curvature_callbacks.model.objective import Objective

_ROUNDING_SHARE: Final = 1e-8  # of the squared gradient norm: below it a parameter may be rounding, (1000 eps)^2 of float32

_PASSES: Final = 4  # backward passes of a microbatch that are proved; all go through the same uses


def certificate_errors(
    context: GramContext, passed: Passed, grams: Mapping[str, Tensor], slices: Mapping[str, Tensor]
) -> dict[str, float]:
    """Parameter to `| w' G G' w - ||grad sum_s w_s l_s||^2 | / sum_s w_s^2 g_s.g_s` for random w.

    w is normal, or balanced signs where only the means of batches are known. A check on the sum of gradients (w = 1) could not
    see a wrong sample axis, and one on blocks not that of a parameter with a small share of its block. Gradients that are
    zero but for rounding (key biases: attention does not depend on them) are judged by their share of all parameters.

    Args:
        context: the loss, the seed of the weights, the processes whose samples S counts.
        passed: of this process. Of more than four backward passes of a microbatch the first four are proved.
        grams: parameter to its (S, S) Gram.
        slices: parameter to the slices of its first axis counted in its Gram, scaled up to all, where these are not all.

    Raises:
        RefusedError: the loss of the rows does not separate (only where it is known as the batch's mean).

    Cost: one gradient (two of half the batch where the loss is only known as a mean); memory P.
    """
    objective, world = context.objective, context.world
    generator = torch.Generator().manual_seed(world.seed(context.seed))
    weights = [
        [_random(batch.num_rows, generator, used=number < _PASSES) for number in range(len(chosen))]
        for batch, chosen in zip(passed.microbatches, passed.surrogates, strict=True)
    ]
    with world.together():
        totals = _weighted_gradients(objective, passed, weights)
    local = [w for of_batch in weights for w in of_batch]
    w = torch.cat([w for of_process in world.gathered(local) for w in of_process]).to(torch.float64)
    if not objective.is_sharded:  # gradients by shards are sums over processes already
        totals = {name: world.total(gradient) for name, gradient in totals.items()}
    floor = _ROUNDING_SHARE * sum(gram.diagonal().sum().item() for gram in grams.values())
    lengths = {name: objective.space.total(_length(_counted(totals[name], slices.get(name)))).item() for name in grams}
    return {name: _error(gram, w, lengths[name], floor) for name, gram in grams.items()}


def _counted(gradient: Tensor, slices: Tensor | None) -> Tensor:
    if slices is None:
        return gradient.flatten()
    return gradient[slices].flatten() * math.sqrt(len(gradient) / len(slices))


def _length(weighted: Tensor) -> Tensor:
    return dot(weighted, weighted)


def _error(gram: Tensor, w: Tensor, actual: float, floor: float) -> float:
    w = w.to(gram.device)
    predicted = (w @ gram @ w).item()
    proved = (gram.diagonal() * w.square()).sum().item()
    scale = max(proved, actual, floor)
    return abs(predicted - actual) / scale if scale > 0 else 0.0


def _random(size: int, generator: torch.Generator, *, used: bool) -> Tensor:
    """Normal numbers, whose sizes differ, so that exchanged samples are seen; zero for a pass that is not proved."""
    return torch.randn(size, generator=generator) if used else torch.zeros(size)


def _signs_of(w: Tensor) -> Tensor:
    """+1 for the larger half of the entries and -1 for the others."""
    signs = torch.ones_like(w)
    signs[w.argsort()[: len(w) // 2]] = -1.0
    return signs


def _weighted_gradients(objective: Objective, passed: Passed, weights: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    leaves = objective.leaves()
    totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for batch, chosen, w in zip(passed.microbatches, passed.surrogates, weights, strict=True):
        for name, gradient in gradients(_weighted_loss(objective, batch, chosen, w, leaves), leaves).items():
            totals[name] += gradient
    return totals


def _weighted_loss(
    objective: Objective,
    batch: Microbatch,
    chosen: Sequence[Surrogate | None],
    weights: Sequence[Tensor],
    leaves: Mapping[str, Tensor],
) -> Tensor:
    """`sum_s w_s l_s`, by halves of the batch where single losses are unknown."""
    with objective.saving():
        losses = objective(batch, leaves)
    if chosen[0] is None and losses.per_sample is None:
        weights[0].copy_(_signs_of(weights[0]))
        return _signed_halves(objective, batch, weights[0], leaves)
    total = losses.total.new_zeros(())
    for surrogate, w in zip(chosen[:_PASSES], weights, strict=False):
        values = losses.per_sample if surrogate is None else surrogate(losses)
        assert values is not None
        total = total + values @ w.to(values)
    return total


def _signed_halves(objective: Objective, batch: Microbatch, w: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    halves = [(sign, rows) for sign in (1.0, -1.0) if len(rows := (w == sign).nonzero()[:, 0])]
    parts = [(sign, objective(batch.take(rows), leaves).total) for sign, rows in halves]
    check_separable(objective, batch, sum(float(part.detach()) for _, part in parts))
    return torch.stack([sign * part for sign, part in parts]).sum()


def signature(operations: Mapping[str, Sequence[Operation]], positions: Mapping[str, Sequence[int]]) -> Signature:
    """Operations with the row layout of each: sample by sample (1), the usual (sample, position) pairs (0), or other."""
    flattened = Counter(count for counts in positions.values() for count in counts if count > 1)
    usual = flattened.most_common(1)[0][0] if flattened else 0
    return frozenset(
        (name, tuple(sorted({operation.name for operation in used})), _layout(positions.get(name, []), usual))
        for name, used in operations.items()
    )


def _layout(positions: Sequence[int], usual: int) -> tuple[int, ...]:
    return tuple(sorted({0 if count == usual else count for count in positions}))
