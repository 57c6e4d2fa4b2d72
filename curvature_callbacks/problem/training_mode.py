"""Losses that are others in evaluation mode, for more than dropout: auxiliary heads, models that give losses in training."""

import copy
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn

from curvature_callbacks.errors import named
from curvature_callbacks.isolation.writes import WriteWatch
from curvature_callbacks.library_internals.modules import buffers_of
from curvature_callbacks.microbatch import Microbatch, few_rows
from curvature_callbacks.model.draws import Draws
from curvature_callbacks.model.loss.averages import Settling
from curvature_callbacks.model.loss.own import OwnLoss
from curvature_callbacks.model.loss.own_evaluation import evaluated
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes.group import is_agreed

_SAME: Final = 1e-4  # relative difference of two losses in float32 that are one function
_MOST_TRIALS: Final = 4

_logger = logging.getLogger("curvature_callbacks")


def settle_training_mode(problem: Problem, memory: ProbeMemory, in_training: Collection[nn.Module]) -> None:
    """Put modules in training mode, for the rest of a probe, without which the loss is not the one that trains.

    Found out once a run, at two rows: in evaluation mode the loss cannot be computed, or it is another one although it
    draws nothing at random in training mode either. Then all modules that training has in training mode are, but for dropouts
    and those that write their buffers in it (batch norms, power iterations, codebooks). A loss that differs by what it draws
    stays in evaluation mode, as with dropout. While it is not known what a loss averages over, one that can be computed in
    evaluation mode waits for the next problem of the run.

    Args:
        problem: of a model in evaluation mode; the first rows of its first microbatch are looked at.
        memory: of the run; keeps the names of the modules.
        in_training: modules that training has in training mode; where there are none, flags tell nothing and all count.

    Cost: once a run one forward pass of two rows in each mode, of a microbatch where it stays whole; further ones in training
    mode where modules write their buffers.
    """
    modules, world = dict(problem.model.named_modules()), problem.world
    if memory.in_training_mode is None:
        of_model = isinstance(memory.loss, OwnLoss)  # whose form need not be known to see what the model returns
        is_settled = of_model or memory.settled_at is not None or not isinstance(memory.loss, Settling)
        objective = problem.objective.with_loss(_returned) if of_model else problem.objective
        candidates = {name for name, module in modules.items() if not in_training or module in in_training}
        found: frozenset[str] | None = frozenset()
        if not problem.objective.is_sharded and not any(module.training for module in modules.values()):
            first = problem.microbatches[0]
            with world.together():
                found = _needed(objective, few_rows(first) if is_settled else first, modules, candidates, is_settled=is_settled)
                if found is None and is_settled:  # these rows have no target
                    found = _needed(objective, first, modules, candidates, is_settled=True)
        known = [names for names in world.gathered(found) if names is not None]
        if not known:
            return
        memory.in_training_mode = max(known, key=len)
        if memory.in_training_mode and world.rank == 0:
            _logger.warning(
                "the loss is another one in evaluation mode, for more than dropout (its forward pass knows `training`): it is "
                "measured with modules in training mode, but for dropouts and those that write their buffers."
            )
    for name in memory.in_training_mode:
        modules[name].training = True


def _needed(
    objective: Objective,
    microbatch: Microbatch,
    modules: dict[str, nn.Module],
    candidates: Collection[str],
    *,
    is_settled: bool,
) -> frozenset[str] | None:
    """Names of the modules that have to be in training mode, none where evaluation mode will do; None: not known yet."""
    chosen = {name: modules[name] for name in candidates if not _is_left(modules[name])}
    in_evaluation = _trial(objective, microbatch, [])
    if in_evaluation.total is not None and not is_settled:
        return None
    for _ in range(_MOST_TRIALS):
        trial = _trial(objective, microbatch, list(chosen.values()))
        if not trial.writers:
            break
        chosen = {name: module for name, module in chosen.items() if module not in trial.writers}
    if trial.total is None or (in_evaluation.total is not None and (trial.is_random or trial.writers)):
        return frozenset()
    if not math.isfinite(trial.total) or not trial.has_targets:
        return None
    is_same = in_evaluation.total is not None and _are_one_function(trial.total, in_evaluation.total)
    return frozenset() if is_same else frozenset(chosen)


def _are_one_function(one: float, other: float) -> bool:
    """Whether two losses are of one function; one that is not finite tells nothing."""
    return not abs(one - other) > _SAME * max(abs(one), abs(other))


def _returned(model: nn.Module, batch: Any) -> SampleLosses:
    """The loss that the model itself returns."""
    call = evaluated(model, batch)
    num_targets = call.num_targets()
    return SampleLosses(call.loss * num_targets.sum().to(call.loss.device), num_targets, None)


@final
@dataclass(frozen=True, slots=True)
class _Trial:
    """One evaluation of a loss.

    Attributes:
        total: its value; None where it raised.
        has_targets: whether any label counts.
        is_random: whether it drew.
        writers: modules whose buffers it has changed.
    """

    total: float | None
    has_targets: bool = True
    is_random: bool = False
    writers: Sequence[nn.Module] = ()


def _trial(objective: Objective, microbatch: Microbatch, modules: Sequence[nn.Module]) -> _Trial:
    """The loss with these modules in training mode; all is as before afterwards."""
    looked_at, watch = copy.copy(objective), WriteWatch()
    looked_at.draws = Draws()
    try:
        with switched_to_training(modules), torch.no_grad(), watch:
            losses = looked_at(microbatch)
            total = float(losses.total)
        writers = [module for module in modules if any(map(watch.changed, _present_buffers(module)))]
    except Exception as error:  # whoever computes the loss next will meet it
        if is_agreed(error):
            raise
        _logger.debug("the loss with %d modules in training mode: %s", len(modules), named(error))
        return _Trial(None)
    finally:
        watch.put_back()
    return _Trial(total, bool(losses.num_targets.any()), looked_at.draws.is_random, writers)


@contextmanager
def switched_to_training(modules: Sequence[nn.Module]) -> Iterator[None]:
    """These modules in training mode, by their flags."""
    try:
        for module in modules:
            module.training = True
        yield
    finally:
        for module in modules:
            module.training = False


def _is_left(module: nn.Module) -> bool:
    """Whether it stays in evaluation mode: dropouts, stochastic depth, and what keeps running statistics."""
    name = type(module).__name__.lower()
    is_dropout = ("drop" in name or "stochasticdepth" in name) and next(module.parameters(), None) is None
    return is_dropout or any(buffer.startswith("running_") for buffer in buffers_of(module))


def _present_buffers(module: nn.Module) -> list[Any]:
    return [buffer for buffer in buffers_of(module).values() if buffer is not None]
