"""When to probe. A step is always an optimizer step."""

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from curvature_callbacks.errors import check_positive


@runtime_checkable
class Schedule(Protocol):
    """Decides from step counts alone, so that all ranks agree."""

    def due(self, step: int, previous: int | None) -> bool:
        """Whether to probe at `step`, when the loop last called at `previous` (None: never)."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EveryNSteps:
    """Due at the first call and whenever a multiple of `n` was reached or crossed since the previous call.

    A crossing test rather than `step % n == 0`: loops that advance by more than one step a call (two manual
    optimizers) never miss a multiple, and calls at an unchanged step (gradient accumulation) never probe twice.

    Example:
        >>> schedule = EveryNSteps(n=5)
        >>> [step for previous, step in [(None, 0), (0, 0), (0, 4), (4, 6), (6, 10)] if schedule.due(step, previous)]
        [0, 6, 10]
    """

    n: int

    def __post_init__(self) -> None:
        check_positive("every_n_steps", self.n)

    def due(self, step: int, previous: int | None) -> bool:
        """Whether a multiple of `n` lies in `(previous, step]`; always at the first call."""
        return previous is None or step // self.n > previous // self.n
