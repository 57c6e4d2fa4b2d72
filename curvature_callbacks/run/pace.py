"""Pace: when the next probe of a run takes place, by schedule, by what probes have cost, and by the loss."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, final

from curvature_callbacks.processes.world import World
from curvature_callbacks.run.schedules import LossSpike, Schedule

Trigger = Literal["schedule", "spike"]


@final
class Pace:
    """Decides on every process alike: clocks and losses are averaged over processes before they decide anything.

    A budget stretches the interval. At a step that the schedule asks for, a probe takes place only if the share of wall time
    that all probes have taken, and half of this one taken as long as the last, is within it (so that the share is met between
    just before a probe and just after it); else it is put off by as many steps as the time missing takes at the pace of the run
    so far, and asks again half of the way. A spike of the loss does not wait; later probes make up for it.

    Args:
        schedule: which steps to ask at.
        max_overhead: share of the run's wall time that probes, with their logging, may take; None for no limit.
        spike: what a spike of the loss is; None to ignore the loss.
        clock: seconds.

    Cost: between the schedule's steps a comparison of integers; of `spike`, for every loss given, its value on the host and one
    average over processes.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        max_overhead: float | None = None,
        spike: LossSpike | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._schedule = schedule
        self._max_overhead = max_overhead
        self._spike = spike
        self._clock = clock
        self.previous: int | None = None
        self._put_off: int | None = None  # the step a probe has to wait for
        self._probe_seconds = self._last_probe_seconds = 0.0  # seconds of all probes, and of the last one
        self._earlier_training = self._earlier_probes = 0.0  # seconds of training, and of probes, before this process started
        self._start: float | None = None
        self._first_step = 0  # step at which the clock started
        self._losses: deque[float] = deque(maxlen=spike.window if spike else 1)
        self._last_spike: int | None = None
        self._spiked = False

    def advance(self, step: int, loss: Any, world: World) -> Trigger | None:
        """The loop has come to `step`: why to probe now, or None.

        Args:
            step: optimizer steps completed.
            loss: of training since the last call, anything `float` takes; not known where it is None or no number.
            world: the processes.
        """
        if self._start is None:
            self._start, self._first_step = self._clock(), step
        self._note_loss(step, loss, world)
        trigger = self._trigger(step, world)
        if trigger is None:
            self.previous = step
        return trigger

    def probed(self, step: int) -> None:
        """A probe took place at `step`: nothing that asked for it waits any more."""
        self.previous, self._put_off, self._spiked = step, None, False

    def spent(self, seconds: float) -> None:
        """Count the `seconds` of the latest probe, with its logging."""
        self._probe_seconds += seconds
        self._last_probe_seconds = seconds

    def overhead(self, seconds: float) -> float:
        """Share of wall time of all probes, with the `seconds` of one that is under way."""
        probing = self._probe_seconds + seconds
        return probing / (probing + max(self._training_seconds() - seconds, 0.0)) if probing > 0 else 0.0

    def state(self) -> dict[str, Any]:
        """The clocks, the losses spikes are judged by, and the steps of the last probe and spike; JSON-able."""
        clocks = {"probing": self._probe_seconds, "latest": self._last_probe_seconds, "training": self._training_seconds()}
        spikes = {"losses": list(self._losses), "last_spike": self._last_spike, "spiked": self._spiked}
        return {"previous": self.previous, "put_off": self._put_off, **clocks, **spikes}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave; what earlier checkpoints lack is as at the start of a run."""
        self.previous = state["previous"]
        self._probe_seconds, self._last_probe_seconds = state.get("probing", 0.0), state.get("latest", 0.0)
        self._earlier_training, self._earlier_probes = state.get("training", 0.0), self._probe_seconds
        self._put_off, self._last_spike = state.get("put_off"), state.get("last_spike")
        self._spiked = state.get("spiked", False)
        self._losses.extend(state.get("losses", ()))

    def _training_seconds(self) -> float:
        """Seconds of wall time outside probes."""
        since_start = 0.0 if self._start is None else self._clock() - self._start
        return self._earlier_training + max(since_start - (self._probe_seconds - self._earlier_probes), 0.0)

    def _trigger(self, step: int, world: World) -> Trigger | None:
        asked = self._schedule.due(step, self.previous) if self._put_off is None else step >= self._put_off
        if asked:
            later = self._affordable_step(step, world)
            if later is None:
                return "schedule"
            self._put_off = later
        return "spike" if self._spiked and (self.previous is None or step > self.previous) else None

    def _affordable_step(self, step: int, world: World) -> int | None:
        """The step to ask again at, where a probe at `step` would take more than its share; None where it would not."""
        if self._max_overhead is None or world.average(self._probe_seconds) == 0:
            return None
        needed = (self._probe_seconds + self._last_probe_seconds / 2) * (1 - self._max_overhead) / self._max_overhead
        missing = world.average(needed - self._training_seconds())
        if missing <= 0:
            return None
        seconds_a_step = (self._training_seconds() - self._earlier_training) / max(step - self._first_step, 1)
        pace = world.average(seconds_a_step)
        steps = missing / pace / 2 if pace > 0 else 0  # half of them: by then the pace may be another
        return step + max(1, math.ceil(steps))

    def _note_loss(self, step: int, loss: Any, world: World) -> None:
        if self._spike is None:
            return
        known = [value for value in world.gathered(as_number(loss)) if value is not None]
        if not known:
            return
        value = statistics.fmean(known)
        calm = self._last_spike is None or step - self._last_spike >= self._spike.cooldown
        if calm and self._is_spike(value):
            self._spiked, self._last_spike = True, step
        if math.isfinite(value):
            self._losses.append(value)

    def _is_spike(self, value: float) -> bool:
        assert self._spike is not None
        if not math.isfinite(value):
            return True
        if len(self._losses) < self._spike.window:
            return False
        return value > statistics.fmean(self._losses) + self._spike.num_std * statistics.pstdev(self._losses)


def as_number(loss: Any) -> float | None:
    """`loss`, where it is one number; whatever else a loop hands over must not end training, or leave other processes alone."""
    try:
        return None if loss is None else float(loss)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # what `float` and tensors of other sizes raise
        return None
