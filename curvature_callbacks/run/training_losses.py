"""TrainingLosses: what the training loop tells of its loss, and whether a probe's is far from it."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, final

import torch

from curvature_callbacks.model.batch_norm import batch_norms
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.problem.training_mode import switched_to_training
from curvature_callbacks.processes.world import World
from curvature_callbacks.run.pace import as_number

_KEPT: Final = 16
_FEWEST: Final = 4  # losses of the loop that have a spread
_FAR: Final = 3.0  # spreads, of the loop's losses and of the probe's microbatches together
_SHARE: Final = 0.5  # of the larger loss, below which a difference is small: the spread of two microbatches tells little

_logger = logging.getLogger("curvature_callbacks")


@final
class TrainingLosses:
    """The latest losses of the training loop, which the probe's own are compared with."""

    def __init__(self) -> None:
        self._recent: deque[Any] = deque(maxlen=_KEPT)
        self._is_said = False

    def note(self, loss: Any) -> None:
        """Keep what the loop gives, anything `float` takes; it is read at a probe only."""
        if loss is not None:
            self._recent.append(loss)

    def beside(self, problem: Problem) -> dict[str, float]:
        """`probe_loss` of a problem whose gradient was taken, `training_loss`, the loop's latest, where there is one.

        The former is that of whole batches where they were measured because the loss couples their rows. Where they are far
        apart that is said once a run, with the reason. Call it last in a probe: the running statistics that are moved to find
        the reason are put back by `isolated`.

        Cost: one forward pass of whole batches; where they are far apart at most two more, once a run.
        """
        training = self._known(problem.world)
        whole = problem.trained.losses
        loss = statistics.fmean(whole) if whole else problem.loss
        scalars = {"probe_loss": loss} | ({"training_loss": training[-1]} if training else {})
        if not self._is_said and is_far(whole or problem.microbatch_losses, training):
            self._is_said = True
            there = statistics.fmean(training)
            reason = _reason(problem, loss, there)
            if problem.world.rank == 0:
                _logger.warning(
                    "the loss of the curvature probe at step %d is %.4g, that of the training loop %.4g at its latest %d: %s. "
                    "Training is not affected. This is said once.",
                    problem.step,
                    loss,
                    there,
                    len(training),
                    reason,
                )
        return scalars

    def _known(self, world: World) -> list[float]:
        """The finite ones, the latest last, each the mean over the processes that have one."""
        columns = zip(*(_filled(one) for one in world.gathered([as_number(loss) for loss in self._recent])), strict=True)
        rows = [[value for value in column if value is not None and math.isfinite(value)] for column in columns]
        return [statistics.fmean(row) for row in rows if row]


def _filled(losses: Sequence[float | None]) -> list[float | None]:
    return [*[None] * (_KEPT - len(losses)), *losses]


def is_far(microbatches: Sequence[float], training: Sequence[float]) -> bool:
    """Whether the mean losses of a probe's microbatches are several spreads away from those of the loop.

    False where there are too few of either to have a spread.
    """
    if len(microbatches) < 2 or len(training) < _FEWEST:
        return False
    here, there = statistics.fmean(microbatches), statistics.fmean(training)
    spread = statistics.pstdev(microbatches) + statistics.pstdev(training)
    return abs(here - there) > max(_FAR * spread, _SHARE * max(abs(here), abs(there)))


def _reason(problem: Problem, here: float, there: float) -> str:
    """What brings the probe's loss at least half of the way from `here` to that of the loop, `there`."""
    norms = batch_norms(problem.model, batch_norm="batch", in_training=()).switched
    others = [module for module in problem.model.modules() if module not in norms and module is not problem.model]
    for reason, modules in (
        ("batch norm normalises by running statistics there, and by the batch in training", norms),
        ("what training mode does (dropout) is off there", others),
    ):
        if modules:
            with switched_to_training(modules), torch.no_grad():  # of parts: by the flag of the whole hooks know a probe
                moved = float(problem.world.total(problem.objective.mean(problem.microbatches, {})))
            if abs(moved - there) <= abs(here - there) / 2:
                return reason
    return (
        "neither batch norm nor training mode explains it, so the rows or what is done to them are other ones "
        "(`probe_dataset`, augmentation, a sampler)"
    )
