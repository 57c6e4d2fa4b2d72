"""Pace: when the next probe of a run takes place, by schedule, by what probes have cost, and by the loss."""

import time
from typing import Final

_LEAST_SECONDS: Final = 1e-3  # what an eigensolver gets that begins at the deadline: its first look ends it


def seconds_left(deadline: float | None, most: float | None = None) -> float | None:
    """Time until the `deadline` of `time.perf_counter`, at most `most`; None where there is neither."""
    if deadline is None:
        return most
    left = max(deadline - time.perf_counter(), _LEAST_SECONDS)
    return left if most is None else min(left, most)
