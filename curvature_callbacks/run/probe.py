"""One probe: isolate the model, draw microbatches, build the problem, run the measurements, with less memory where needed."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch

from curvature_callbacks.errors import ConfigurationError, ProbeError, is_out_of_memory
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.isolation.model import isolated, seeded
from curvature_callbacks.library_internals.fsdp import reshard
from curvature_callbacks.measurements import Measurement, OfKronecker
from curvature_callbacks.microbatch import Microbatch, at_most
from curvature_callbacks.model.blocks import group_blocks
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.resolve import is_function
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.probes import Probes, with_seeds
from curvature_callbacks.problem.deadline import NO_DEADLINE, Deadline
from curvature_callbacks.problem.occasion import Occasion
from curvature_callbacks.problem.packing import as_drawn, may_take_apart
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.problem.slices import may_slice, unsliced
from curvature_callbacks.problem.subject import Subject
from curvature_callbacks.problem.training_mode import settle_training_mode
from curvature_callbacks.processes.fsdp import check_model_over_processes, take_buffers
from curvature_callbacks.processes.world import World
from curvature_callbacks.record import Record
from curvature_callbacks.run.choice import check_optimizer
from curvature_callbacks.run.failures import Failures
from curvature_callbacks.run.states import States


@final
class Probe:
    """The microbatches of one probe, and the problems that are made of them.

    A problem is built once, and again, after the one before was let go, only where memory has run out.

    Args:
        subject: of the run.
        microbatches: as they were drawn.
        occasion: of this probe; nothing is begun after its deadline.
        written: where it is noted what has to be put back after the probe.

    Attributes:
        microbatches: as they were drawn.
    """

    def __init__(self, subject: Subject, microbatches: Sequence[Microbatch], occasion: Occasion, written: ExitStack) -> None:
        self.microbatches = microbatches
        self._subject = subject
        self._occasion = occasion
        self._written = written

    def problem(
        self, microbatches: Sequence[Microbatch], *, sharing: Mapping[FisherType, Sharing], watch_writes: bool = False
    ) -> Problem:
        """The problem of these microbatches.

        Args:
            microbatches: those drawn, or smaller ones of the same rows.
            sharing: types of Fisher whose Grams are to come with Kronecker factors, and how positions enter these.
            watch_writes: first of all find out what the loss changes in place; it is put back then and after the probe. Cost:
                one forward pass.
        """
        problem = Problem.of(self._subject, microbatches, self._occasion, sharing)
        if watch_writes:
            self._written.callback(problem.objective.watch_writes(problem.microbatches[0]).put_back)
        settle_training_mode(problem, self._subject.memory, self._occasion.in_training)
        if not may_take_apart(problem, self._subject.memory):
            problem = Problem.of(self._subject, as_drawn(problem.microbatches), self._occasion, sharing)
        if not may_slice(problem, self._subject.memory):
            problem = Problem.of(self._subject, unsliced(problem.microbatches), self._occasion, sharing)
        return problem

    def rows(self) -> Sequence[Microbatch]:
        """The microbatches, packed ones of packed rows where an earlier probe has found that these are not taken apart."""
        return as_drawn(self.microbatches) if self._subject.memory.takes_packed_apart is False else self.microbatches

    @property
    def may_write(self) -> bool:
        """Whether the loss may change parameters or other tensors, at some steps only: then each probe has to watch it."""
        return is_function(self._subject.loss)

    def is_late(self) -> bool:
        """Whether the time of this probe is up on any process."""
        deadline = self._occasion.deadline
        return deadline != NO_DEADLINE and self._occasion.world.anywhere(deadline.has_passed)


def check_subject(subject: Subject, measure: Sequence[Measurement], world: World) -> None:
    """Raise a `ConfigurationError` where model, blocks or optimizer rule these measurements out; no data is drawn."""
    reshard(subject.model.modules())
    check_model_over_processes(subject.model, world)
    trainable = {name: value for name, value in subject.model.named_parameters() if value.requires_grad}
    if not trainable:
        raise ConfigurationError("the model has no trainable parameter: nothing to measure.")
    keeps = subject.params_filter
    names = [name for name, value in trainable.items() if keeps is None or keeps(name, value)]
    group_blocks(subject.model, names, subject.block_structure)
    check_optimizer(measure, subject.optimizer, {name: trainable[name] for name in names})


@contextmanager
def isolated_probe(
    subject: Subject, probes: Probes, *, seed: int, step: int, world: World, max_seconds: float | None = None
) -> Iterator[Probe | None]:
    """The probe of `step`, inside which nothing leaks into training; None while there is no data.

    Processes leave together: all normally, or all with an exception.
    """
    with world.together(), isolated(subject.model, seed=world.seed(seed)) as in_training:
        take_buffers(subject.model, world)
        microbatches = probes.draw(seed)
        if world.anywhere(microbatches is None):
            yield None
            return
        assert microbatches is not None
        occasion = Occasion(
            seed=seed,
            step=step,
            world=world,
            deadline=Deadline.after(max_seconds),
            in_training=in_training,
            draw_whole=partial(_drawn_whole, subject, probes, seed, world),
        )
        subject.memory.draws.forget()
        with ExitStack() as written:
            yield Probe(subject, with_seeds(microbatches, seed, world), occasion, written)


def _drawn_whole(subject: Subject, probes: Probes, seed: int, world: World) -> Sequence[Any] | None:
    """Whole batches of the probe with this seed, whatever was drawn and measured before."""
    with seeded(subject.model, seed=world.seed(seed)):
        return probes.draw_whole(seed)


@final
class Probing:
    """Runs the measurements of each probe.

    Where memory runs out a measurement is tried again on the same rows in microbatches of half the size, down to single rows;
    the size that worked is kept for the rest of the run. A microbatch of a layout that is not known stays whole, and where all
    do the measurement fails; so does one that has taken whole batches, because the loss couples their rows. What would begin
    after a probe's time is up waits for the next probe, which begins with it.

    Args:
        measure: what to measure.
        failures: of the run.
        memory: of the run; holds the size that worked.

    Attributes:
        states: what measurements carry from probe to probe.
        skipped: names of those that the last probe had no time for.
    """

    def __init__(self, measure: Sequence[Measurement], failures: Failures, memory: GramMemory) -> None:
        self._measure = measure
        self._failures = failures
        self._memory = memory
        self.states = States()
        self.skipped: list[str] = []

    @property
    def sharing(self) -> dict[FisherType, Sharing]:
        """The types of Fisher whose Kronecker factors are measured, and how positions enter these."""
        return {each.fisher_type: each.sharing for each in reversed(self._active()) if isinstance(each, OfKronecker)}

    def run(self, probe: Probe) -> tuple[Problem, list[Record]]:
        """The problem that was measured last, and the records."""
        limit = self._memory.row_limit
        problem = probe.problem(
            probe.microbatches if limit is None else at_most(probe.rows(), limit),
            sharing=self.sharing,
            watch_writes=probe.may_write,
        )
        waited, self.skipped = self.skipped, []
        records: list[Record] = []
        for measurement in sorted(self._active(), key=lambda each: _turn(each.name, waited)):
            if probe.is_late() and records:  # something is measured in any case
                self.skipped.append(measurement.name)
                continue
            measured = self._tried(measurement, problem)
            while measured is None:
                microbatches = problem.microbatches
                del problem  # its graphs must be gone before the next one is built
                problem = probe.problem(self._smaller(microbatches), sharing=self.sharing)
                measured = self._tried(measurement, problem)
            records += measured
        return problem, records

    def _active(self) -> list[Measurement]:
        return [each for each in self._measure if each.name not in self._failures.switched_off]

    def _tried(self, measurement: Measurement, problem: Problem) -> list[Record] | None:
        """The records of one measurement; None where memory ran out and there are smaller microbatches."""
        name, start, world = measurement.name, time.perf_counter(), problem.world
        num_taken = problem.trained.num_taken
        try:
            problem.settle_loss()
            with world.together():
                problem.prove()
                state = self.states[name] if name in self.states else measurement.init(problem)
                records, state = measurement.measure(problem, state)
                seconds = world.average(time.perf_counter() - start)
        except Exception as error:
            uncut = problem.trained.coupling if problem.trained.num_taken > num_taken else None
            if is_out_of_memory(error) and world.anywhere(uncut is None and _most_rows(problem.microbatches) > 1):
                self._failures.warn_once(
                    "memory", f"memory ran out in `{name}`, which is tried with smaller microbatches", error
                )
                return None
            return [self._failures.failed(name, problem.step, _with_reason(error, problem.microbatches, uncut))]
        self.states[name] = state  # only now: every process has got here
        self._failures.succeeded(name)
        in_training = any(module.training for module in problem.model.modules())  # where the loss would be another one without
        about = {"random": problem.objective.draws.is_random, "training_mode": in_training, "packing": problem.packing}
        facts = {name: value for name, value in about.items() if value}
        return [replace(record, seconds=seconds, metadata={**record.metadata, **facts}) for record in records]

    def _smaller(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """Halves, after what the failed try held was let go."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        limit = max(1, -(-_most_rows(microbatches) // 2))
        self._memory.row_limit = limit
        return at_most(microbatches, limit)


def _with_reason(error: Exception, microbatches: Sequence[Microbatch], coupling: str | None) -> Exception:
    """The error; where memory ran out, with why the microbatches are not made smaller."""
    if not is_out_of_memory(error):
        return error
    if coupling is not None:
        reason = (
            f"memory ran out, and a batch of the size of training is never cut where the loss couples its rows ({coupling}): "
            "measure fewer parameters (`params_filter`), or batch norms on running statistics (`batch_norm`='eval')."
        )
    elif any(microbatch.is_whole for microbatch in microbatches):
        reason = (
            "memory ran out, and a microbatch stays whole whose tensors have not one row each for its rows: take fewer rows "
            "(`microbatch_size`)."
        )
    else:
        return error
    whole = ProbeError(reason)
    whole.__cause__ = error
    return whole


def _most_rows(microbatches: Sequence[Microbatch]) -> int:
    """Of those that can be cut; 0 where all stay whole."""
    return max((microbatch.num_rows for microbatch in microbatches if not microbatch.is_whole), default=0)


def _turn(name: str, waited: Sequence[str]) -> int:
    """Those that waited come first, the longest wait before the others, or one of three would never have its turn."""
    return waited.index(name) if name in waited else len(waited)
