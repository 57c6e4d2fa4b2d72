"""Occasion: the step, the seed, the processes and the time of one probe."""

from dataclasses import dataclass
from typing import final

from curvature_callbacks.problem.deadline import NO_DEADLINE, Deadline
from curvature_callbacks.processes.world import SINGLE, World


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Occasion:
    """What one probe is beside its microbatches; another probe of the same run has another.

    Attributes:
        seed: of all random choices.
        step: optimizer steps completed.
        world: the processes, each with microbatches of its own.
        deadline: when the probe's time is up.
    """

    seed: int
    step: int
    world: World = SINGLE
    deadline: Deadline = NO_DEADLINE
