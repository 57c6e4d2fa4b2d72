"""What the callback measures: which loss, and the Trainer's own to compare it with."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from typing_extensions import override

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.isolation.model import seeded
from curvature_callbacks.microbatch import as_microbatch
from curvature_callbacks.model.loss.averages import Evaluate, Settling
from curvature_callbacks.model.loss.loop import LoopLoss
from curvature_callbacks.model.loss.own import OwnLoss
from curvature_callbacks.model.loss.resolve import Loss, LossCallable, MicrobatchLoss, is_function
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.processes.world import World
from curvature_callbacks.transformers.loss import (
    computed_loss,
    computes_in_its_own_way,
    departures,
    is_computed,
    loss_of_trainer,
)

_MATCH: Final = 1e-5  # relative; a mean loss and its rebuilt form differ by 1e-7
_MOVED: Final = 0.01  # noise that parameters are moved by, about a weight's size in a wide layer
_ADVICE: Final = (
    "Pass `loss_fn`='trainer' to measure what the Trainer minimises, or a function `(model, batch) -> scalar mean or (N,) "
    "losses` to measure another loss on purpose."
)

_logger = logging.getLogger("curvature_callbacks")


@final
@dataclass(frozen=True, slots=True, eq=False)
class MeasuredLoss:
    """A loss and what it is compared with.

    Attributes:
        loss: to measure; see `resolve_loss`.
        loop: the Trainer's own; None where it is measured itself, or cannot be called for a comparison.
    """

    loss: Loss
    loop: LoopLoss | None


def measured_loss(
    loss_fn: Loss, follows_trainer: bool, *, args: TrainingArguments, trainer: Trainer | None, world: World
) -> MeasuredLoss:
    """The loss to measure for these arguments of the callback.

    Args:
        loss_fn: as given; None for the model's own where that is what trains, else what the Trainer minimises.
        follows_trainer: whether `loss_fn` was "trainer".
        args: of the Trainer.
        trainer: None where it was not found.
        world: the processes that train.

    Raises:
        ConfigurationError: see `loss_of_trainer`.
    """
    if follows_trainer:
        loss = loss_of_trainer(trainer, world)
        return MeasuredLoss(loss, None if is_computed(loss) else _trained(trainer, world))
    reasons = departures(args, trainer)
    if loss_fn is not None or not reasons:
        return MeasuredLoss(loss_fn, _trained(trainer, world, is_by_choice=is_function(loss_fn)))
    if trainer is None or _is_unequal(trainer, world):
        _logger.warning(
            "curvature is measured for the model's own `.loss`, without %s: pass `loss_fn`='trainer' to measure the loss you "
            "train.",
            " and ".join(reasons),
        )
        return MeasuredLoss(None, None)
    loss = loss_of_trainer(trainer, world)
    if is_function(loss) and is_computed(loss):
        loss = OwnWhereItTrains(loss, " and ".join(reasons), world)
    return MeasuredLoss(loss, _trained(trainer, world))


@final
class OwnWhereItTrains(MicrobatchLoss):
    """The model's own loss where what the Trainer computes has its value, else the latter: overriding may only log.

    It is decided at the first batch with a finite loss, at the parameters and near them, because a divergence from where
    training begins is zero there, and so is its gradient. Each probe looks again, and what differs once is measured as it is
    computed from then on.

    Of the model's own loss single targets and the likelihood are known, of a computed one the value.

    Args:
        computed: what the Trainer computes.
        reasons: why that may be another loss.
        world: the processes, which decide alike.
    """

    def __init__(self, computed: LossCallable, reasons: str, world: World) -> None:
        self._computed = computed
        self._reasons = reasons
        self._world = world
        self._own = OwnLoss()
        self._chosen: LossCallable | None = None
        self._is_near = False  # whether both were compared near the parameters too

    @override
    def __call__(self, model: nn.Module, microbatch: Any) -> Tensor | SampleLosses:
        batch = as_microbatch(microbatch)
        if self._chosen is None:
            self._choose(self._is_own(model, batch))
        return (self._chosen or self._computed)(model, batch)

    def settle(self, evaluate: Evaluate, microbatches: Sequence[Any], world: World) -> None:
        """Decide, and find out what the loss that it is averages over; see `Settling`."""
        if self._chosen is not self._own and isinstance(self._computed, Settling):
            self._computed.settle(evaluate, microbatches, world)
        if self._chosen is self._computed:
            return
        found = [evaluate(self._is_own, microbatches[0], moved=moved) for moved in ((0.0,) if self._is_near else (0.0, _MOVED))]
        was_own = self._chosen is self._own
        self._choose(None if None in found else all(found))
        self._is_near = self._chosen is self._own
        if self._is_near:
            self._own.settle(evaluate, microbatches, world)
        elif was_own and isinstance(self._computed, Settling):
            self._computed.settle(evaluate, microbatches, world)

    def _choose(self, is_own: bool | None) -> None:
        """By what all processes found on a batch of theirs; not yet where nobody knows."""
        found = [each for each in self._world.gathered(is_own) if each is not None]
        if not found:
            return
        self._chosen = self._own if all(found) else self._computed
        if not all(found) and self._world.rank == 0:
            _logger.info("curvature is measured of what the Trainer computes with %s.", self._reasons)

    def _is_own(self, model: nn.Module, batch: Any) -> bool | None:
        """Whether both have the same value on `batch`; None where it is not finite. Cost: an evaluation each."""
        with torch.no_grad():
            with seeded(model, seed=0):
                computed = _mean_of(self._computed(model, batch))
            try:
                with seeded(model, seed=0):
                    own = _mean_of(self._own(model, batch))
            except ConfigurationError:  # there is no `.loss`
                return False
        return abs(own - computed) <= _MATCH * abs(computed) if abs(computed) < float("inf") else None


def _mean_of(losses: Tensor | SampleLosses) -> float:
    if isinstance(losses, SampleLosses):
        return float(losses.total / losses.num_targets.sum())
    return float(losses.mean())


def _trained(trainer: Trainer | None, world: World, *, is_by_choice: bool = False) -> LoopLoss | None:
    if trainer is None or _is_unequal(trainer, world):
        return None
    return LoopLoss(
        function=partial(computed_loss, trainer),
        name="the Trainer's `compute_loss`",
        is_by_choice=is_by_choice,
        advice=_ADVICE,
    )


def _is_unequal(trainer: Trainer, world: World) -> bool:
    """Whether processes might call something else: an overridden `compute_loss` may gather over them."""
    return world.size > 1 and computes_in_its_own_way(trainer)
