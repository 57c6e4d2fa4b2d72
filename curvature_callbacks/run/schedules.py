"""When to probe. A step is always an optimizer step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, final, runtime_checkable

from curvature_callbacks.errors import ConfigurationError, check_positive

_LOG_ROUNDING: Final = 1e-9  # of a logarithm: a power of ten must count as reached


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


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AtSteps:
    """Due when one of the listed `steps` was reached or crossed since the previous call.

    Example:
        >>> schedule = AtSteps(steps=[0, 5, 20])
        >>> [step for previous, step in [(None, 0), (0, 4), (4, 6), (6, 20), (20, 30)] if schedule.due(step, previous)]
        [0, 6, 20]
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        listed: Any = self.steps if isinstance(self.steps, list | tuple) else ()
        if not listed or any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in listed):
            raise ConfigurationError(f"`steps` must list integers of at least 0, got {self.steps!r}.")

    def due(self, step: int, previous: int | None) -> bool:
        """Whether a listed step lies in `(previous, step]`; at the first call, whether `step` is listed."""
        start = step - 1 if previous is None else previous
        return any(start < listed <= step for listed in self.steps)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LogSpaced:
    """Due at the first call and at steps evenly spaced on a logarithmic axis: `first * 10^(i / per_decade)`, i = 0, 1, ...

    Early training changes fast: with the defaults steps 0, 10, 18, 32, 57, 100, 178, ...

    Example:
        >>> schedule = LogSpaced(per_decade=2, first=10)
        >>> [step for step in range(1000) if schedule.due(step, step - 1 if step else None)]
        [0, 10, 32, 100, 317]
    """

    per_decade: int = 4
    first: int = 10

    def __post_init__(self) -> None:
        check_positive("per_decade", self.per_decade)
        check_positive("first", self.first)

    def due(self, step: int, previous: int | None) -> bool:
        """Whether such a step lies in `(previous, step]`; always at the first call."""
        return previous is None or self._reached(step) > self._reached(previous)

    def _reached(self, step: int) -> int:
        """How many of them are at most `step`."""
        if step < self.first:
            return 0
        count = math.floor(self.per_decade * math.log10(step / self.first) + _LOG_ROUNDING)
        return count + 1 if self.first * 10 ** (count / self.per_decade) <= step + _LOG_ROUNDING else count


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpike:
    """A probe out of turn, when the training loss leaves its range.

    A loss is a spike when it lies more than `num_std` standard deviations above the mean of the `window` losses before it, or
    is not finite.

    Attributes:
        num_std: how many.
        window: how many losses make up the range; until there are so many nothing but a non-finite loss is a spike.
        cooldown: optimizer steps after a spike in which no other one counts.
    """

    num_std: float = 5.0
    window: int = 50
    cooldown: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.num_std, bool) or not isinstance(self.num_std, int | float) or not self.num_std > 0:
            raise ConfigurationError(f"`num_std` must be a positive number, got {self.num_std!r}.")
        if not isinstance(self.window, int) or self.window < 2:
            raise ConfigurationError(f"`window` must be an integer of at least 2, got {self.window!r}.")
        check_positive("cooldown", self.cooldown)
