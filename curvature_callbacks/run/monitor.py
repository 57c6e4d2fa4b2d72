"""CurvatureMonitor: schedule, isolate, draw, measure, hand the records on. The package without a framework."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, final, get_args

from torch import nn
from torch.utils.data import DataLoader

from curvature_callbacks.errors import (
    ConfigurationError,
    check_choice,
    check_positive,
    check_seconds,
    check_share,
    is_out_of_memory,
    named,
)
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.isolation.writes import WriteWatch
from curvature_callbacks.library_internals.fsdp import reshard
from curvature_callbacks.measurements import Checked, Measurement, OfFisher, OfKronecker
from curvature_callbacks.model.blocks import BlockStructure, check_block_structure, group_blocks
from curvature_callbacks.model.loss.resolve import Loss, is_function
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.probes import CapturedProbes, Draw, Probes, as_probes, stable_seed
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes.fsdp import check_model_over_processes, take_buffers
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.processes.world import World
from curvature_callbacks.record import PROBE, Record
from curvature_callbacks.run.choice import check_optimizer, checked_measurements
from curvature_callbacks.run.failures import Failures
from curvature_callbacks.run.pace import Pace, Trigger
from curvature_callbacks.run.probe import Probing
from curvature_callbacks.run.probe_record import PROBE_HEADLINE, probe_record
from curvature_callbacks.run.schedules import EveryNSteps, LossSpike, Schedule
from curvature_callbacks.run.states import States
from curvature_callbacks.sinks import MemorySink, Sink

_logger = logging.getLogger("curvature_callbacks")


@final
class CurvatureMonitor:
    """Measures the curvature of a model's training loss every so many optimizer steps.

    Call `step(step)` once an optimizer step (after it, with the number of steps completed; 0 before the first). When nothing
    is due it returns in microseconds. A probe leaves no trace in the training run: see `isolated`. What goes wrong inside a
    probe is recorded and warned about once, never raised; a bad configuration is raised by `check`, which the first `step`
    calls if you have not.

    With many processes (DDP, FSDP2) call `check` and `step` on all: each draws rows of its own, the numbers are those of all
    rows and the same everywhere, and rank zero writes.

    Args:
        model: the module training runs, unwrapped (no DDP, no `torch.compile` wrapper).
        probes: a `DataLoader` over a map-style dataset (its dataset is indexed, the loader never iterated), a list of
            microbatches, or a `Probes` object.
        measure: measurements; default Fisher spectrum, Hessian eigenpairs, K-FAC coverage.
        when: every how many steps, or a schedule.
        max_overhead: largest share of wall time for probes, with their logging; where they take more the interval is stretched.
        max_seconds: of a probe, after which no measurement is begun and Lanczos ends at its next look.
        spike: a probe out of turn when the `loss` given to `step` leaves its range.
        sinks: receivers of the records, called on rank zero only unless they have `every_process = True`; `history` holds the
            records in any case.
        loss: None for the model's own `.loss` (mapping batches); `cross_entropy`, `mse` or `bce` for `(inputs, targets)`; or
            `(model, batch) -> scalar mean | (N,) per-sample losses`.
        params_filter: `(name, parameter) -> bool`, which trainable parameters to measure.
        block_structure: `layer`, `component`, `module`, `parameter`, `none`, `{block: [names]}` or a function: `group_blocks`.
        draw: `fresh` rows at every probe or `fixed` ones.
        num_microbatches: microbatches a probe, when `probes` is a loader.
        microbatch_size: rows of each.
        seed: with the step it determines every draw and start vector.
        optimizer: what trains the model, or several of them, for measurements of it (`EdgeRatio`); only read.

    Attributes:
        history: every record so far.

    Raises:
        ConfigurationError: a bad option.

    Cost: of a probe: the sum over `measure` plus one gradient; between probes a comparison of integers.

    Example:
        >>> import torch
        >>> from curvature_callbacks import KFACCoverage
        >>> model = torch.nn.Linear(4, 3)
        >>> batch = (torch.randn(8, 4), torch.randint(3, (8,)))
        >>> monitor = CurvatureMonitor(model, probes=[batch], loss="cross_entropy", measure=[KFACCoverage()], when=10)
        >>> [len(monitor.step(step)) for step in (0, 5, 10)]
        [2, 0, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        probes: DataLoader[Any] | Probes | Sequence[Any],
        measure: Sequence[Measurement] | None = None,
        when: int | Schedule = 200,
        max_overhead: float | None = None,
        max_seconds: float | None = None,
        spike: LossSpike | None = None,
        sinks: Sequence[Sink] = (),
        loss: Loss = None,
        params_filter: ParamsFilter | None = None,
        block_structure: BlockStructure = "layer",
        draw: Draw = "fresh",
        num_microbatches: int = 4,
        microbatch_size: int = 8,
        seed: int = 0,
        optimizer: Optimizers | None = None,
    ) -> None:
        check_choice("draw", draw, get_args(Draw))
        check_block_structure(block_structure)
        check_positive("num_microbatches", num_microbatches)
        check_positive("microbatch_size", microbatch_size)
        self._model = model
        self._probes = as_probes(probes, num_microbatches=num_microbatches, microbatch_size=microbatch_size)
        self._measure = checked_measurements(measure)
        check_share("max_overhead", max_overhead)
        check_seconds("max_seconds", max_seconds)
        schedule = when if isinstance(when, Schedule) else EveryNSteps(n=when)
        self._timing = Pace(schedule, max_overhead=max_overhead, spike=spike)
        self._max_seconds = max_seconds
        self._memory = MemorySink()
        self._sinks: list[Sink] = [self._memory, *sinks]
        self._problem_options: dict[str, Any] = {
            "loss": loss,
            "params_filter": params_filter,
            "block_structure": block_structure,
        }
        self._draw = draw
        self._seed = seed
        self._optimizer = optimizer
        self._known = ProbeMemory()
        self._states = States()
        self._failures = Failures()
        self._measuring = Probing(self._measure, self._failures, self._states, self._known.grams)
        self._sink_seconds = 0.0  # what the sinks took at the previous probe
        self._checked = False

    @property
    def history(self) -> list[Record]:
        """Every record so far, in order."""
        return self._memory.records

    def check(self, step: int = 0) -> None:
        """Raise a `ConfigurationError` for what can never be measured, before anything is trained.

        Looks at the model, then at loss and labels of the microbatches that `step` would draw. Of a stream that has no data yet
        the first probe records what is wrong.

        Cost: one draw and two forward passes over it, one more for each measurement that has to ask the loss.
        """
        world = current_world()
        with world.together():
            reshard(self._model.modules())
            check_model_over_processes(self._model, world)
            trainable = {name: value for name, value in self._model.named_parameters() if value.requires_grad}
            if not trainable:
                raise ConfigurationError("the model has no trainable parameter: nothing to measure.")
            keep = self._problem_options["params_filter"]
            names = [name for name, value in trainable.items() if keep is None or keep(name, value)]
            group_blocks(self._model, names, self._problem_options["block_structure"])
            check_optimizer(self._measure, self._optimizer, {name: trainable[name] for name in names})
        seed = self._probe_seed(step)
        self._checked = True
        try:
            with world.together(), isolated(self._model, seed=world.seed(seed)):
                take_buffers(self._model, world)
                microbatches = self._probes.draw(seed)
                if not world.anywhere(microbatches is None):
                    assert microbatches is not None
                    problem = self._problem(microbatches, seed, step, world)
                    with ExitStack() as stack:
                        stack.callback(_watched(problem).put_back)
                        problem.check([one.fisher_type for one in self._measure if isinstance(one, OfFisher)])
                        for one in self._measure:
                            if isinstance(one, Checked):
                                one.check(problem)
        except ConfigurationError:
            raise
        except Exception as error:
            if is_out_of_memory(error):  # the probe will meet it, record it and report it
                _logger.debug("the check of the curvature probe ran out of memory: %s", error)
                return
            raise ConfigurationError(
                f"the loss of a first probe could not be computed ({named(error)}): check the data drawn from "
                "the training set and the loss function."
            ) from error

    def step(self, step: int, loss: Any = None, *, logged_as: int | None = None) -> list[Record]:
        """Measure if `step` is due; the records of this probe, empty when it is not.

        Args:
            step: optimizer steps completed; decides whether to measure.
            loss: of training since the last call, for `spike`.
            logged_as: the step the records carry, where the loop's loggers count otherwise; default `step`.
        """
        trigger = self._timing.due(step, loss, current_world())
        if trigger is None:
            return []
        shown = step if logged_as is None else logged_as
        if not self._checked:
            self.check(shown)
        start = time.perf_counter()
        records = self._probe(shown, trigger)
        if not records:
            return []  # no data yet: still due at the next call
        self._timing.probed(step)
        self._hand_on(records)
        self._timing.spent(time.perf_counter() - start)
        return records

    def draw_from(self, probes: Probes) -> None:
        """Draw later probes from another source: a loader made anew."""
        self._probes = probes

    def offer(self, batch: Any) -> None:
        """Show a training batch to probes that watch the loop (`CapturedProbes`); what cannot be kept is reported once."""
        if not isinstance(self._probes, CapturedProbes):
            return
        try:
            self._probes.offer(batch)
        except Exception as error:
            self._failures.say("captured batches", "curvature probes could not keep a training batch", error)

    def state_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """What a checkpoint needs: the last step seen, the failures in a row, and the states of measurements.

        Args:
            tensors: False for a checkpoint in JSON; the vectors that eigensolvers start from are then left out.
        """
        return {
            **self._timing.state(),
            "failures": dict(self._failures.counts),
            "states": self._states.saved(tensors=tensors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._timing.load(state)
        self._failures.load(state["failures"])
        self._states.load(state.get("states", {}))  # which the first checkpoints did not have

    def _probe(self, step: int, trigger: Trigger) -> list[Record]:
        start = time.perf_counter()
        seed, world = self._probe_seed(step), current_world()
        records: list[Record] = []
        try:
            with world.together(), isolated(self._model, seed=world.seed(seed)):
                take_buffers(self._model, world)
                microbatches = self._probes.draw(seed)
                if world.anywhere(microbatches is None):
                    return []
                assert microbatches is not None

                def build(found: Sequence[Any]) -> Problem:
                    return self._problem(found, seed, step, world)

                with ExitStack() as stack:
                    if is_function(self._problem_options["loss"]):  # which may write at some steps only
                        stack.callback(_watched(build(microbatches)).put_back)
                    problem, records = self._measuring.run(microbatches, build, max_seconds=self._max_seconds)
                    seconds = time.perf_counter() - start
                    summary = probe_record(
                        problem,
                        records,
                        seconds=seconds,
                        sink_seconds=self._sink_seconds,
                        switched_off=self._failures.switched_off,
                        skipped=self._measuring.skipped,
                        overhead=self._timing.overhead(seconds),
                        about={"draw": self._draw, "trigger": trigger},
                    )
        except Exception as error:
            failed = self._failures.recorded(PROBE, step, error)
            scalars = {"failed": 1.0, "probe_seconds": time.perf_counter() - start}
            summary = replace(failed, scalars=scalars, headline=PROBE_HEADLINE)
        return [summary, *records]

    def _hand_on(self, records: Sequence[Record]) -> None:
        start, is_writer = time.perf_counter(), current_world().rank == 0
        for sink in [one for one in self._sinks if is_writer or getattr(one, "every_process", False)]:
            try:
                sink.write(records)
            except Exception as error:
                name = type(sink).__name__
                self._failures.say(name, f"curvature sink `{name}` failed", error)
        self._sink_seconds = time.perf_counter() - start

    def _problem(self, microbatches: Sequence[Any], seed: int, step: int, world: World) -> Problem:
        active = [one for one in self._measure if one.name not in self._failures.switched_off]
        sharing = {one.fisher_type: one.sharing for one in reversed(active) if isinstance(one, OfKronecker)}
        return Problem(
            self._model,
            microbatches,
            seed=seed,
            step=step,
            memory=self._known,
            sharing=sharing,
            optimizer=self._optimizer,
            world=world,
            **self._problem_options,
        )

    def _probe_seed(self, step: int) -> int:
        return stable_seed(self._seed, step if self._draw == "fresh" else "fixed")


def _watched(problem: Problem) -> WriteWatch:
    return problem.objective.watch_writes(problem.microbatches[0])
