"""Whether the loss of a batch is a sum over its rows: rows change places between batches of the same shape."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from curvature_callbacks.errors import is_out_of_memory, named
from curvature_callbacks.isolation.model import seeded
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.loss.sample_losses import IGNORED
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.problem.evaluation import TOLERANCE
from curvature_callbacks.processes.group import is_agreed
from curvature_callbacks.processes.world import World

_MOST_PAIRS: Final = 4  # of rows that change places
FEWEST_ROWS: Final = 4  # of which two pairs can change places
_MOST_ROWS: Final = 8  # looked at of a batch of the size of training

_logger = logging.getLogger("curvature_callbacks")


def coupling_of(objective: Objective, batch: Microbatch, num_targets: Tensor, *, seed: int, world: World) -> str | None:
    """Why the loss of `batch` is no sum over rows; None where it is one, or where rows cannot change places.

    `L(a, b) + L(c, d) = L(a, d) + L(c, b)` for groups of rows a, b, c, d, L the summed loss: each row keeps its place, each
    batch its shape, its number of targets and its random draw, so that neither padding nor the way the loss averages nor noise
    makes a difference, only what rows have to do with each other.

    Args:
        objective: its loss settled.
        batch: of rows that may be taken one by one.
        num_targets: (N,) of the batch.
        seed: of what the loss draws.
        world: all call it; the first that finds a reason gives it to the others.

    Where rows differ too much to change places they are looked at one by one.

    Cost: four forward passes over at most half of the rows; two more where it finds a reason. Else six of four rows.
    """
    groups = _exchangeable(batch, num_targets)
    if objective.is_sharded and world.anywhere(groups is None):  # every pass gathers parameters, and all must take part
        return None
    reason = _found(objective, batch, groups, seed)
    return next((each for each in world.gathered(reason) if each is not None), None)


def coupling_of_rows(objective: Objective, batch: Microbatch, *, seed: int, world: World) -> str | None:
    """The same of the first rows of a large batch, whose targets are not known yet. Cost: a forward pass of eight rows more."""
    few, counts = replace(batch.take(torch.arange(min(batch.num_rows, _MOST_ROWS))), among=None), None
    try:
        with torch.no_grad(), seeded(objective.modules[0], seed=seed):
            counts = objective(few).num_targets
    except Exception as error:
        if is_agreed(error) or is_out_of_memory(error):
            raise
        _logger.debug("the first rows of a batch have no loss: %s", named(error))
    if world.anywhere(counts is None):
        return None
    assert counts is not None
    return coupling_of(objective, few, counts, seed=seed, world=world)


def _found(objective: Objective, batch: Microbatch, groups: Sequence[Tensor] | None, seed: int) -> str | None:
    """As `_apart`, or `_alone` where no rows can change places.

    None where the loss does not run on some of its rows: a batch that training takes stops nothing.
    """
    try:
        return _alone(objective, batch, seed) if groups is None else _apart(objective, batch, groups, seed)
    except Exception as error:
        if is_agreed(error) or is_out_of_memory(error):
            raise
        _logger.debug("rows could not change places: %s", named(error))
        return None


def _exchangeable(batch: Microbatch, num_targets: Tensor) -> list[Tensor] | None:
    """Groups a, b, c, d of rows, a with as many targets as c row by row, and b as d; None where there are not enough."""
    counts = num_targets.tolist()
    if batch.is_whole:
        return None
    looks = _looks(batch.content, counts)
    order = sorted((row for row, count in enumerate(counts) if count > 0), key=lambda row: looks[row])
    pairs: list[tuple[int, int]] = []
    taken = -1
    for place, (one, other) in enumerate(pairwise(order)):
        if looks[one] == looks[other] and place > taken:
            pairs.append((one, other))
            taken = place + 1
    pairs = pairs[: min(_MOST_PAIRS, len(pairs) // 2 * 2)]
    if len(pairs) < 2:
        return None
    first, second = pairs[::2], pairs[1::2]
    return [torch.tensor([pair[side] for pair in half]) for side in (0, 1) for half in (first, second)]


def _looks(batch: Any, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """For each row its number of targets, of ignored labels and of unmasked positions: rows alike in these weigh the same."""
    columns = [list(counts)]
    for name, value in batch.items() if isinstance(batch, Mapping) else ():
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(counts) and not value.is_floating_point():
            counted = value != 0 if "mask" in str(name) else value == IGNORED
            columns.append(counted.flatten(1).sum(1).tolist())
    return list(zip(*columns, strict=True))


def _apart(objective: Objective, batch: Microbatch, groups: Sequence[Tensor], seed: int) -> str | None:
    a, b, c, d = groups

    def summed(*rows: Tensor) -> float:
        with torch.no_grad(), seeded(objective.modules[0], seed=seed):
            return float(objective(replace(batch.take(torch.cat(rows)), among=None)).total)  # what places draw, not rows

    before, after = (summed(a, b), summed(c, d)), (summed(a, d), summed(c, b))
    size = sum(map(abs, (*before, *after))) / 2
    if not abs(sum(before) - sum(after)) > TOLERANCE * size:
        return None
    again = summed(a, b) - before[0], summed(a, d) - after[0]
    if max(map(abs, again)) > TOLERANCE * size:  # it draws from a generator of its own
        return None
    return f"rows that change places between batches make {sum(after):.6g} of {sum(before):.6g}"


def _alone(objective: Objective, batch: Microbatch, seed: int) -> str | None:
    """Why a few rows have another loss together than one by one; a mean over ragged targets is coupled by its divisor."""
    if batch.is_whole or batch.num_rows < 2:
        return None
    few = replace(batch.take(torch.arange(min(batch.num_rows, _MOST_PAIRS))), among=None)

    def summed(rows: Microbatch) -> float:
        with torch.no_grad(), seeded(objective.modules[0], seed=seed):
            return float(objective(rows).total)

    together, again = summed(few), summed(few)
    alone = [summed(row) for row in few.singles()]
    size = max(abs(together), sum(map(abs, alone)))
    if not abs(together - sum(alone)) > TOLERANCE * size or abs(again - together) > TOLERANCE * size:
        return None
    return f"rows one by one make {sum(alone):.6g} of {together:.6g}"
