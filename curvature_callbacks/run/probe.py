"""Probing: the measurements of a run, probe after probe, with what they carry on and what goes wrong."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, final

import torch

from curvature_callbacks.batches import at_most, batch_size
from curvature_callbacks.errors import is_out_of_memory
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.measurements import Measurement
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import Record
from curvature_callbacks.run.failures import Failures
from curvature_callbacks.run.states import States

Build = Callable[[Sequence[Any]], Problem]


@final
class Probing:
    """Runs the measurements of each probe.

    Where memory runs out a measurement is tried again on the same rows in microbatches of half the size, down to single rows;
    the size that worked is kept for the rest of the run. What would begin after a probe's time is up waits for the next probe,
    which begins with it.

    Args:
        measure: what to measure.
        failures: of the run.
        states: what measurements carry from probe to probe.
        memory: of the run; holds the size that worked.

    Attributes:
        skipped: names of those that the last probe had no time for.
    """

    def __init__(self, measure: Sequence[Measurement], failures: Failures, states: States, memory: GramMemory) -> None:
        self._measure = measure
        self._failures = failures
        self._states = states
        self._memory = memory
        self.skipped: list[str] = []

    def run(self, microbatches: Sequence[Any], build: Build, *, max_seconds: float | None) -> tuple[Problem, list[Record]]:
        """The problem that was measured last, and the records.

        Args:
            microbatches: of the probe.
            build: makes a problem of them.
            max_seconds: after which nothing is begun; None for no limit.
        """
        limit = self._memory.row_limit
        problem = build(microbatches if limit is None else at_most(microbatches, limit))
        deadline = None if max_seconds is None else time.perf_counter() + max_seconds
        problem.deadline = deadline
        waited, self.skipped = self.skipped, []
        records: list[Record] = []
        for measurement in sorted(self._active(), key=lambda one: _place(one.name, waited)):
            late = deadline is not None and problem.world.anywhere(time.perf_counter() > deadline)
            if late and records:  # something is measured in any case
                self.skipped.append(measurement.name)
                continue
            found = self._tried(measurement, problem)
            while found is None:
                microbatches = problem.microbatches
                del problem  # its graphs must be gone before the next one is built
                problem = build(self._smaller(microbatches))
                problem.deadline = deadline
                found = self._tried(measurement, problem)
            records += found
        return problem, records

    def _active(self) -> list[Measurement]:
        return [one for one in self._measure if one.name not in self._failures.switched_off]

    def _tried(self, measurement: Measurement, problem: Problem) -> list[Record] | None:
        """The records of one measurement; None where memory ran out and there are smaller microbatches."""
        name, start, world = measurement.name, time.perf_counter(), problem.world
        try:
            with world.together():
                state = self._states[name] if name in self._states else measurement.init(problem)
                found, state = measurement.measure(problem, state)
                seconds = world.average(time.perf_counter() - start)
        except Exception as error:
            if is_out_of_memory(error) and world.anywhere(max(map(batch_size, problem.microbatches)) > 1):
                self._failures.say("memory", f"memory ran out in `{name}`, which is tried with smaller microbatches", error)
                return None
            return [self._failures.failed(name, problem.step, error)]
        self._states[name] = state  # only now: it is everybody's
        self._failures.succeeded(name)
        return [replace(record, seconds=seconds) for record in found]

    def _smaller(self, microbatches: Sequence[Any]) -> list[Any]:
        """Halves, after what the failed try held was let go."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        limit = -(-max(map(batch_size, microbatches)) // 2)
        self._memory.row_limit = limit
        return at_most(microbatches, limit)


def _place(name: str, waited: Sequence[str]) -> int:
    """Those that waited come first, the longest wait before the others, or one of three would never have its turn."""
    return waited.index(name) if name in waited else len(waited)
