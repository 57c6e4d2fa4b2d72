"""CurvatureMonitor: schedule, isolate, draw, measure, hand the records on. The package without a framework."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, final

from torch import nn
from torch.utils.data import DataLoader

from curvature_callbacks.errors import ConfigurationError, ProbeError, is_out_of_memory, named
from curvature_callbacks.measurements import Checked, Measurement, OfFisher
from curvature_callbacks.model.batch_norm import BatchNorm
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.probes import CapturedProbes, Draw, Probes, as_probes, stable_seed
from curvature_callbacks.problem.targets import check_repeatable
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.record import PROBE, Record
from curvature_callbacks.run.choice import chosen_measurements
from curvature_callbacks.run.failures import Failures
from curvature_callbacks.run.pace import Pace, Trigger
from curvature_callbacks.run.probe import Probe, Probing, check_subject, isolated_probe
from curvature_callbacks.run.probe_record import PROBE_HEADLINE, probe_record
from curvature_callbacks.run.schedules import LossSpike, Schedule
from curvature_callbacks.run.settings import EVERY_N_STEPS, Settings
from curvature_callbacks.run.setup import Setup
from curvature_callbacks.run.training_losses import TrainingLosses
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
        batch_norm: statistics of the batch, as in training (`batch`), or running ones (`eval`); None for `batch` in Hessians,
            the GGN and `EdgeRatio`, on whole batches of the size of training, and for `eval` in Fishers, Grams and K-FAC.

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
        batch_norm: BatchNorm | None = None,
    ) -> None:
        settings = Settings(
            every_n_steps=EVERY_N_STEPS if isinstance(when, Schedule) else when,
            schedule=when if isinstance(when, Schedule) else None,
            measure=list(measure) if isinstance(measure, Iterator) else measure,  # read more than once
            num_microbatches=num_microbatches,
            microbatch_size=microbatch_size,
            draw=draw,
            params_filter=params_filter,
            block_structure=block_structure,
            seed=seed,
            max_overhead=max_overhead,
            max_seconds=max_seconds,
            spike=spike,
            batch_norm=batch_norm,
        )
        source = as_probes(probes, num_microbatches=num_microbatches, microbatch_size=microbatch_size)
        self._begin(Setup(model=model, settings=settings, probes=source, sinks=sinks, loss=loss, optimizer=optimizer))

    @classmethod
    def of(cls, setup: Setup) -> "CurvatureMonitor":
        """The monitor of a callback, whose arguments are validated already; its loss and its rows are the framework's."""
        monitor = cls.__new__(cls)
        monitor._begin(setup)
        return monitor

    def _begin(self, setup: Setup) -> None:
        settings = self._settings = setup.settings
        self._subject = setup.new_subject()
        self._has_batch_norms = self._subject.has_batch_norms()
        self._probes = setup.probes
        self._measure = chosen_measurements(settings.measure)
        self._pace = Pace(settings.when, max_overhead=settings.max_overhead, spike=settings.spike)
        self._failures = Failures()
        self._probing = Probing(self._measure, self._failures, self._subject.memory.grams)
        self._memory = MemorySink()
        self._sinks: list[Sink] = [self._memory, *setup.sinks]
        self._sink_seconds = 0.0  # what the sinks took at the previous probe
        self._checked = False
        self._is_probing = False
        self._losses = TrainingLosses()

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
        with current_world().together():
            check_subject(self._subject, self._measure, current_world())
        self._checked = True
        try:
            with self._isolated_probe(step) as probe:
                if probe is not None:
                    self._check_probe(probe)
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

    def _check_probe(self, probe: Probe) -> None:
        problem = probe.problem(probe.microbatches, sharing=self._probing.sharing, watch_writes=True)
        with suppress(ProbeError):  # several forms are possible: the probe records it, and the next one looks again
            problem.settle_loss()
        problem.check([each.fisher_type for each in self._measure if isinstance(each, OfFisher)])
        check_repeatable(problem.objective, problem.microbatches[0])
        for measurement in self._measure:
            if isinstance(measurement, Checked):
                measurement.check(problem)

    def step(self, step: int, loss: Any = None, *, logged_as: int | None = None) -> list[Record]:
        """Measure if `step` is due; the records of this probe, empty when it is not.

        Args:
            step: optimizer steps completed; decides whether to measure.
            loss: of training since the last call, for `spike`, and to stand beside the probe's own in its record.
            logged_as: the step the records carry, where the loop's loggers count otherwise; default `step`.
        """
        self._losses.note(loss)
        trigger = self._pace.advance(step, loss, current_world())
        if trigger is None:
            return []
        shown = step if logged_as is None else logged_as
        if not self._checked:
            self.check(shown)
        start = time.perf_counter()
        records = self._probe(shown, trigger)
        if not records:
            return []  # no data yet: still due at the next call
        self._pace.probed(step)
        self._hand_on(records)
        self._pace.spent(time.perf_counter() - start)
        return records

    def draw_from(self, probes: Probes) -> None:
        """Draw later probes from another source: a loader made anew."""
        self._probes = probes

    def offer(self, batch: Any) -> None:
        """Show a training batch to probes that watch the loop (`CapturedProbes`); what cannot be kept is reported once.

        What a probe itself computes a loss of is no training batch.
        """
        if self._is_probing or not isinstance(self._probes, CapturedProbes):
            return
        with self._failures.reported("captured batches", "curvature probes could not keep a training batch"):
            memory = self._subject.memory
            may_couple = self._has_batch_norms or memory.coupled is not None or memory.proof is None
            self._probes.offer(batch, whole=may_couple)

    def state_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """What a checkpoint needs: the last step seen, the failures in a row, and the states of measurements.

        Args:
            tensors: False for a checkpoint in JSON; the vectors that eigensolvers start from are then left out.
        """
        return {
            **self._pace.state(),
            "failures": dict(self._failures.counts),
            "states": self._probing.states.saved(tensors=tensors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the clocks, failures and states that `state_dict` gave, also where it left the tensors out."""
        self._pace.load(state)
        self._failures.load(state["failures"])
        self._probing.states.load(state.get("states", {}))  # which the first checkpoints did not have

    @contextmanager
    def _isolated_probe(self, step: int, *, max_seconds: float | None = None) -> Iterator[Probe | None]:
        seed, world = self._probe_seed(step), current_world()
        self._is_probing = True
        try:
            with isolated_probe(
                self._subject, self._probes, seed=seed, step=step, world=world, max_seconds=max_seconds
            ) as probe:
                yield probe
        finally:
            self._is_probing = False

    def _probe(self, step: int, trigger: Trigger) -> list[Record]:
        start = time.perf_counter()
        records: list[Record] = []
        try:
            with self._isolated_probe(step, max_seconds=self._settings.max_seconds) as probe:
                if probe is None:
                    return []
                problem, records = self._probing.run(probe)
                seconds = time.perf_counter() - start
                summary = probe_record(
                    problem,
                    records,
                    failures=self._failures,
                    training_losses=self._losses,
                    seconds=seconds,
                    sink_seconds=self._sink_seconds,
                    skipped=self._probing.skipped,
                    overhead=self._pace.overhead(seconds),
                    about={"draw": self._settings.draw, "trigger": trigger},
                )
        except Exception as error:
            failed = self._failures.recorded(PROBE, step, error)
            scalars = {"failed": 1.0, "probe_seconds": time.perf_counter() - start}
            summary = replace(failed, scalars=scalars, headline=PROBE_HEADLINE)
        return [summary, *records]

    def _hand_on(self, records: Sequence[Record]) -> None:
        start, is_writer = time.perf_counter(), current_world().rank == 0
        for sink in [each for each in self._sinks if is_writer or getattr(each, "every_process", False)]:
            name = type(sink).__name__
            with self._failures.reported(name, f"curvature sink `{name}` failed"):
                sink.write(records)
        self._sink_seconds = time.perf_counter() - start

    def _probe_seed(self, step: int) -> int:
        return stable_seed(self._settings.seed, step if self._settings.draw == "fresh" else "fixed")
