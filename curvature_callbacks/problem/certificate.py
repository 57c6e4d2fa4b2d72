"""The certificate of a run's objective: what is measured is what trains, proved before a number is computed from it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar, final

import torch
from torch import Tensor, nn

from curvature_callbacks.errors import ConfigurationError, is_out_of_memory, named
from curvature_callbacks.isolation.model import seeded
from curvature_callbacks.library_internals.tensors import dispatch_mode
from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.model.loss.loop import LoopLoss
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.problem.coupling import coupling_of
from curvature_callbacks.problem.evaluation import (
    TOLERANCE,
    Difference,
    Evaluation,
    difference,
    differentiated,
    evaluated_objective,
)
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.reach import Reached, check_reach
from curvature_callbacks.processes.world import World

_NARROW: Final = 2e-2, 1e-1  # of value and gradient in bfloat16 or float16, which have two to three digits
_FEWEST_ROWS: Final = 2

_logger = logging.getLogger("curvature_callbacks")
R = TypeVar("R")


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """The loss as it is measured, at the rows it is proved on.

    Attributes:
        objective: of the run.
        batch: of these rows.
        leaves: of all trainable parameters, in place of the model's own.
        num_targets: (N,) of the rows.
        is_sum: whether the loss that trains is the sum that the measured one is the mean of.
        evaluation: value and gradient.
        seed: of what a loss draws, the same in all evaluations.
        world: the processes.
    """

    objective: Objective
    batch: Microbatch
    leaves: Mapping[str, Tensor]
    num_targets: Tensor
    is_sum: bool
    evaluation: Evaluation
    seed: int
    world: World


def prove_objective(
    objective: Objective, batch: Microbatch, memory: ProbeMemory, *, most_rows: int, seed: int, world: World
) -> None:
    """Prove a run's objective at one microbatch; `memory` keeps what was found, and whether rows are coupled.

    | what | against | relative tolerance |
    | --- | --- | --- |
    | every trainable parameter that the loss depends on is reached | the graph | |
    | value and gradient with substituted parameters | the model's own parameters, plain autograd | 1e-4; 2e-2 and 0.1 in bf16 |
    | value and gradient of the measured loss | the training loop's own loss | 1e-4; 2e-2 and 0.1 in bf16 |
    | the loss of a batch is a sum over its rows | rows exchanged between batches | 1e-4 |

    All in evaluation mode, on the same rows, with the same random draws. What cannot be compared (a loss that draws from a
    generator of its own, parameters that only exist in shards, a loop's loss that raises) is kept with its reason, and stops
    nothing. Values are relative to the mean of `|l_i|`, gradients to the larger norm.

    Args:
        objective: its loss settled.
        batch: a microbatch with a valid target.
        memory: of the run.
        most_rows: to compare at, where the batch can be cut.
        seed: of what a loss draws.
        world: the processes, all of which call it.

    Raises:
        ConfigurationError: a parameter is not reached; one of the comparisons fails, and the loss was not chosen as another by
            a function of the user's (then it is said once).

    Cost: in gradients of these rows, 0.67 with the graph for its gradient, 1 by live parameters, 1.33 by the loop's loss (none
    where that is measured itself); beside them the graph of the microbatch, and four forward passes of half of it for the rows.
    In gradients of a probe of 4 x 8 rows, measured on a CPU, alone and with the loop's loss: GPT-2 (4 layers, width 128) 0.63
    and 0.84, a ResNet of 3 blocks 0.74 and 1.0, FSDP2 over two processes 0.3 and 0.7 (gathered on use 0.6 and 0.7, 4 x 256
    rows each). Memory: the gradient three times.
    """
    with seeded(objective.modules[0], seed=seed):
        reached = check_reach(objective, batch)
    num_targets = reached.losses.num_targets
    facts: dict[str, Any] = {}
    if not world.anywhere(not num_targets.any()):
        measured = _at_few_rows(objective, batch, reached, most_rows=most_rows, seed=seed, world=world)
        del reached
        facts["rows"] = len(measured.num_targets)
        facts["by live parameters"] = _by_live_parameters(measured)
        if memory.loop is not None:
            facts["by the training loop"] = _by_the_loop(measured, memory.loop)
        memory.coupled = memory.coupled or coupling_of(objective, batch, num_targets, seed=seed, world=world)
        facts["coupled"] = memory.coupled
        memory.proof = world.gathered(facts)[0]  # else the next probe tries


def _at_few_rows(
    objective: Objective, batch: Microbatch, reached: Reached, *, most_rows: int, seed: int, world: World
) -> _Measured:
    """The measured loss at some rows of the batch, where it can be cut, or at all of them."""
    counts = reached.losses.num_targets
    if batch.num_rows > most_rows and not batch.is_whole and not objective.is_sharded:
        rows = counts.nonzero()[:, 0][:most_rows]
        few, leaves = replace(batch.take(rows), among=None), objective.trainable_stand_ins()  # all losses draw for these alone
        evaluation = _tried(partial(evaluated_objective, objective, few, leaves, seed), world)
        if isinstance(evaluation, Evaluation):
            return _Measured(objective, few, leaves, counts[rows], reached.losses.is_sum, evaluation, seed, world)
    evaluation = differentiated(reached.losses, reached.stand_ins)
    return _Measured(objective, batch, reached.stand_ins, counts, reached.losses.is_sum, evaluation, seed, world)


def _by_live_parameters(measured: _Measured) -> str | dict[str, float]:
    """How far the measured loss is from the model's own evaluation of it, or why that is not known."""
    objective = measured.objective
    if objective.live_obstacle is not None:
        return objective.live_obstacle

    def live() -> Evaluation:
        with torch.enable_grad(), seeded(objective.modules[0], seed=measured.seed):
            losses = objective.of_live_parameters(measured.batch)
        return differentiated(losses, objective.live_parameters)

    found = _tried(live, measured.world)
    if isinstance(found, str):
        return found
    apart = difference(measured.evaluation, found)
    if not apart.is_finite:
        return "not finite"
    if not apart.exceeds(*(_NARROW if objective.is_widened else (TOLERANCE,))):
        return {"value": apart.value, "gradient": apart.gradient}
    if _draws_at_random(objective, measured):
        return "the loss draws from a generator of its own"
    raise ConfigurationError(
        f"the loss is another with other tensors in place of the model's parameters: {_compared(measured, found, apart)}. The "
        "model computes with something else than the parameters registered in it (a copy, or a cache of what was computed from "
        "them): let it compute that anew in the forward pass."
    )


def _by_the_loop(measured: _Measured, loop: LoopLoss) -> str | dict[str, float]:
    """How far the measured loss is from the training loop's, or why that is not known."""
    theirs = measured.objective.with_loss(partial(_as_losses, loop.function, measured.num_targets, measured.is_sum))
    with _writes_put_back(theirs, measured.batch):
        found = _tried(partial(evaluated_objective, theirs, measured.batch, measured.leaves, measured.seed), measured.world)
    if isinstance(found, str):
        return found
    apart = difference(measured.evaluation, found)
    if not apart.is_finite:
        return "not finite"
    if not apart.exceeds(TOLERANCE):
        return {"value": apart.value, "gradient": apart.gradient}
    if not apart.exceeds(*_NARROW) and (_is_narrow(theirs, measured.batch) or _is_narrow(measured.objective, measured.batch)):
        return {"value": apart.value, "gradient": apart.gradient}
    if _draws_at_random(theirs, measured) or _draws_at_random(measured.objective, measured):
        return "it draws at random"
    said = f"{_compared(measured, found, apart, loop.name)}. {loop.advice}"
    if not loop.is_by_choice:
        raise ConfigurationError(f"the loss to measure is not the loss that trains: {said}")
    if measured.world.rank == 0:
        _logger.warning("curvature is measured of another loss than the one that trains: %s", said)
    return {"value": apart.value, "gradient": apart.gradient}


def _compared(measured: _Measured, other: Evaluation, apart: Difference, name: str = "the model's own evaluation") -> str:
    """Both values, and how the gradients differ."""
    if apart.missing:
        how = f"`{apart.missing[0]}` has a gradient in the latter only"
    elif apart.factor is not None:
        how = f"the gradient of the first is {apart.factor:.4g} times that of the other"
    else:
        how = f"their gradients differ by {apart.gradient:.3g} of their norm, most in `{apart.worst}`"
    rows = len(measured.num_targets)
    return f"on the same {rows} rows it is {measured.evaluation.value:.6g}, that of {name} {other.value:.6g}, and {how}"


def _as_losses(
    function: Callable[[nn.Module, Any], Tensor], num_targets: Tensor, is_sum: bool, model: nn.Module, batch: Any
) -> SampleLosses:
    """A mean, or one loss per row, as the sum that it is the mean of; a sum as it is."""
    value = function(model, as_microbatch(batch).content)
    return SampleLosses(value.sum() if is_sum else value.mean() * num_targets.sum(), num_targets, None)


def _tried(evaluate: Callable[[], R], world: World) -> R | str:
    """What it returns, or what it raises, on all processes; where memory runs out that is raised."""
    try:
        with world.together():
            return evaluate()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"not compared, {named(error)}"


@contextmanager
def _writes_put_back(objective: Objective, batch: Any) -> Iterator[None]:
    """What this loss changes in place, inside, is as before afterwards. Cost: one forward pass."""
    watch = objective.watch_writes(batch)
    try:
        yield
    finally:
        watch.put_back()


def _is_narrow(objective: Objective, batch: Any) -> bool:
    """Whether the loss computes in bfloat16 or float16, by an autocast of its own. Cost: one forward pass."""
    narrow: list[torch.dtype] = []

    def watched(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = operation(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16):
            narrow.append(result.dtype)
        return result

    with dispatch_mode(watched):
        objective.watch_writes(batch).put_back()
    return bool(narrow)


def _draws_at_random(objective: Objective, measured: _Measured) -> bool:
    """Whether the loss draws: from a generator that is known, or by another evaluation that has another value.

    Cost: three forward passes.
    """

    def values() -> list[float]:
        with torch.no_grad():
            return [float(objective(measured.batch).total) for _ in range(2)]

    with _writes_put_back(objective, measured.batch):
        found = _tried(values, measured.world)
    differs = not isinstance(found, str) and max(found) - min(found) > TOLERANCE * max(map(abs, found))
    return objective.draws.is_random or differs
