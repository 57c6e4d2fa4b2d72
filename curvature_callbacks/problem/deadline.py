"""Deadline: when the time of a probe is up, for measurements that can end early."""

import time
from dataclasses import dataclass
from typing import Final, final

_LEAST_SECONDS: Final = 1e-3  # what an eigensolver gets that begins at the deadline: its first look ends it


@final
@dataclass(frozen=True, slots=True)
class Deadline:
    """A time of `time.perf_counter` on this process; `at` is None where there is no limit."""

    at: float | None = None

    @classmethod
    def after(cls, seconds: float | None) -> "Deadline":
        """The deadline that many seconds from now."""
        return cls(None if seconds is None else time.perf_counter() + seconds)

    @property
    def has_passed(self) -> bool:
        """Whether the time is up here; clocks of other processes differ."""
        return self.at is not None and time.perf_counter() > self.at

    def seconds_left(self, most: float | None = None) -> float | None:
        """Time until then, above 0 and at most `most`; None where there is neither limit."""
        if self.at is None:
            return most
        left = max(self.at - time.perf_counter(), _LEAST_SECONDS)
        return left if most is None else min(left, most)


NO_DEADLINE: Final = Deadline()
