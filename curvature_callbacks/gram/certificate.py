"""Certificate: one more forward and backward pass that proves every parameter's Gram, the sample axis included."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.gram.row_by_row import check_separable
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.linalg.accumulate import dot
from curvature_callbacks.model.loss.surrogates import Surrogate
from curvature_callbacks.model.objective import Objective, gradients
from curvature_callbacks.processes.world import SINGLE, World

_ROUNDING: Final = 1e-8  # share of the squared gradient norm below which a parameter may be rounding: (1000 eps)^2 of float32

_PASSES: Final = 4  # backward passes of a microbatch that are proved; all go through the same uses

TOLERANCE: Final = 1e-4  # a right Gram agrees to 1e-7, a wrong sample axis misses by 0.7


def certificate_errors(
    objective: Objective,
    microbatches: Sequence[Any],
    grams: Mapping[str, Tensor],
    surrogates: Sequence[Sequence[Surrogate | None]],
    rows: Mapping[str, Tensor],
    *,
    seed: int,
    world: World = SINGLE,
) -> dict[str, float]:
    """Parameter to `| w' G G' w - ||grad sum_s w_s l_s||^2 | / sum_s w_s^2 g_s.g_s` for random w.

    w is normal, or balanced signs where only the means of batches are known. A check on the sum of gradients (w = 1) could not
    see a wrong sample axis, and one on whole blocks not that of a parameter with a small share of them. Gradients that are
    zero but for rounding (key biases: attention does not depend on them) are judged by their share of all parameters.

    Args:
        objective: the loss.
        microbatches: of the probe.
        grams: parameter to its (S, S) Gram.
        surrogates: for each microbatch what its backward passes differentiate; None for the sum of losses. Of more than four
            the first four are proved.
        rows: parameter to the rows counted in its Gram, scaled up to all, where these are not all.
        seed: of the weights.
        world: the processes whose samples S counts, by rank.

    Raises:
        RefusedError: the loss of the rows does not separate (only where it is known as the batch's mean).

    Cost: one gradient (two of half the batch where the loss is only known as a mean); memory P.
    """
    generator = torch.Generator().manual_seed(world.seed(seed))
    weights = [
        [_random(batch_size(batch), generator, used=number < _PASSES) for number in range(len(chosen))]
        for batch, chosen in zip(microbatches, surrogates, strict=True)
    ]
    with world.together():
        found = _weighted_gradients(objective, microbatches, surrogates, weights)
    own = [one for batch in weights for one in batch]
    w = torch.cat([one for part in world.gathered(own) for one in part]).to(torch.float64)
    if not objective.is_sharded:  # gradients by shards are sums over processes already
        found = {name: world.total(gradient) for name, gradient in found.items()}
    floor = _ROUNDING * sum(gram.diagonal().sum().item() for gram in grams.values())
    lengths = {name: objective.space.total(_length(_counted(found[name], rows.get(name)))).item() for name in grams}
    return {name: _error(gram, w, lengths[name], floor) for name, gram in grams.items()}


def _counted(gradient: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return gradient.flatten()
    return gradient[rows].flatten() * math.sqrt(len(gradient) / len(rows))


def _length(weighted: Tensor) -> Tensor:
    return dot(weighted, weighted)


def _error(gram: Tensor, w: Tensor, actual: float, floor: float) -> float:
    w = w.to(gram.device)
    predicted = (w @ gram @ w).item()
    proved = (gram.diagonal() * w.square()).sum().item()
    scale = max(proved, actual, floor)
    return abs(predicted - actual) / scale if scale > 0 else 0.0


def _random(size: int, generator: torch.Generator, *, used: bool) -> Tensor:
    """Normal numbers, whose sizes differ, so that samples that changed places are seen; zero for a pass that is not proved."""
    return torch.randn(size, generator=generator) if used else torch.zeros(size)


def _signs_of(w: Tensor) -> Tensor:
    """+1 for the larger half of the entries and -1 for the others."""
    signs = torch.ones_like(w)
    signs[w.argsort()[: len(w) // 2]] = -1.0
    return signs


def _weighted_gradients(
    objective: Objective,
    microbatches: Sequence[Any],
    surrogates: Sequence[Sequence[Surrogate | None]],
    weights: Sequence[Sequence[Tensor]],
) -> dict[str, Tensor]:
    leaves = objective.leaves()
    totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for batch, chosen, w in zip(microbatches, surrogates, weights, strict=True):
        for name, gradient in gradients(_weighted_loss(objective, batch, chosen, w, leaves), leaves).items():
            totals[name] += gradient
    return totals


def _weighted_loss(
    objective: Objective,
    batch: Any,
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


def _signed_halves(objective: Objective, batch: Any, w: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    halves = [(sign, rows) for sign in (1.0, -1.0) if len(rows := (w == sign).nonzero()[:, 0])]
    parts = [(sign, objective(take_rows(batch, rows), leaves).total) for sign, rows in halves]
    check_separable(objective, batch, sum(float(part.detach()) for _, part in parts))
    return torch.stack([sign * part for sign, part in parts]).sum()


Signature = frozenset[tuple[str, tuple[str, ...], tuple[int, ...]]]


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
