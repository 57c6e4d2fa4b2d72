"""Occasion: the step, the seed, the processes and the time of one probe, and how the model trains at that time."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from curvature_callbacks.problem.deadline import NO_DEADLINE, Deadline
from curvature_callbacks.processes.world import SINGLE, World

DrawWhole = Callable[[], Sequence[Any] | None]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Occasion:
    """What one probe is beside its microbatches; another probe of the same run has another.

    Attributes:
        seed: of all random choices.
        step: optimizer steps completed.
        world: the processes, each with microbatches of its own.
        deadline: when the probe's time is up.
        in_training: the modules that training has in training mode; where there are none, batch norms count as if they were.
        draw_whole: draws whole batches, of the size of training; None where the microbatches are whole ones.
    """

    seed: int
    step: int
    world: World = SINGLE
    deadline: Deadline = NO_DEADLINE
    in_training: Collection[nn.Module] = ()
    draw_whole: DrawWhole | None = None
