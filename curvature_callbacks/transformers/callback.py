"""The callback for the Hugging Face Trainer."""

import logging
from pathlib import Path
from typing import Any, Literal, final

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from curvature_callbacks._optional import require
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.measurements import Measurement
from curvature_callbacks.model.batch_norm import BatchNorm
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.probes import Draw, Probes
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.record import Record
from curvature_callbacks.run.fingerprint import DESCRIPTION, warn_of_change
from curvature_callbacks.run.monitor import CurvatureMonitor
from curvature_callbacks.run.schedules import LossSpike, Schedule
from curvature_callbacks.run.settings import Settings
from curvature_callbacks.run.setup import Setup
from curvature_callbacks.run.states import load_with_tensors, save_with_tensors
from curvature_callbacks.sinks import JSONLinesSink, MemorySink, Sink

require("transformers", extra="transformers")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

from curvature_callbacks.transformers.checkpoints import (  # noqa: E402
    STATES,
    states_of_nobody,
    tensor_file,
    tensor_files,
)
from curvature_callbacks.transformers.frames import calling_trainer  # noqa: E402
from curvature_callbacks.transformers.loss import ComputeLossWatch, departures  # noqa: E402
from curvature_callbacks.transformers.measured import measured_loss  # noqa: E402
from curvature_callbacks.transformers.sinks import ReporterSink, TrainerLog, reporters_of, tensorboard_writer  # noqa: E402

_logger = logging.getLogger("curvature_callbacks")


@final
class CurvatureCallback(TrainerCallback):
    """Measures the curvature of the training loss every `every_n_steps` optimizer steps, and changes nothing else.

    After an optimizer step that is due it draws `num_microbatches * microbatch_size` rows of the training data (indexing
    the dataset, never iterating the loader; copies of the latest training batches where the data is a stream), measures in
    float32 without the Trainer's autocast, and logs. The loss is the model's own `.loss` unless `loss_fn` is given, or
    what the Trainer minimises where label smoothing, `compute_loss_func` or an overridden `compute_loss` make that another.

    Tags: see the measurements; of the probe itself `curvature/probe_seconds`, `curvature/failed`,
    `curvature_probe/sink_seconds` (of the probe before), `curvature_probe/matvecs`, `curvature_probe/rows`,
    `curvature_probe/microbatch_size`, `curvature_probe/overhead`, `curvature_probe/skipped`,
    `curvature_probe/gradient_equivalents`, `curvature_probe/non_finite`, `curvature_probe/probe_loss`,
    `curvature_probe/training_loss` (the loop's latest). TensorBoard gets them under these names through the
    Trainer's own writer, with heat maps, histograms and a table; the other reporters, `log_history` and the progress bar get
    the headline numbers; `curvature.jsonl` in `output_dir` holds everything. The Trainer is found when training begins;
    `attach(trainer)` names it where that is not possible.

    Args:
        every_n_steps: optimizer steps between probes; the start of training always measures.
        measure: measurements; default `[FisherSpectrum(), TopEigenpairs(), KFACCoverage()]`.
        num_microbatches: microbatches a probe.
        microbatch_size: rows of each.
        draw: `fresh` rows at every probe or `fixed` ones.
        loss_fn: `(model, batch) -> scalar mean | (N,) per-sample losses`, or `cross_entropy`, `mse` or `bce` where batches are
            `(inputs, targets)`: types of Fisher that need single targets or the likelihood have them from a named loss.
            `trainer` is what the Trainer minimises: the smoothed cross-entropy, with all its types of Fisher, or what
            `compute_loss_func` or an overridden `compute_loss` return for `num_items_in_batch=None`: the mean over rows or over
            labels that are not ignored, or one loss per row. Nothing is logged and no attribute of the Trainer changed by
            calling them; that a function collects elsewhere (in a global) is not known.
        params_filter: `(name, parameter) -> bool`, which trainable parameters to measure.
        block_structure: `layer`, `component`, `module`, `parameter`, `none`, `{block: [names]}` or a function: `group_blocks`.
        seed: with the step it determines every draw.
        schedule: `AtSteps`, `LogSpaced` or one of your own, in place of `every_n_steps`.
        max_overhead: share of the run's wall time that probes may take; where they would take more the interval is stretched.
        max_seconds: of a probe, after which no measurement is begun and eigensolvers end at their next look.
        spike: `LossSpike()` probes out of turn when the training loss leaves its range.
        probe_dataset: map-style, what to measure on in place of the training data; collated like it.
        probe_dataloader: a DataLoader with a dataset and a collator of its own to measure on.
        max_sequence_length: cut token sequences of probes to so many positions.
        batch_norm: statistics of the batch, as in training (`batch`), or running ones (`eval`); None for `batch` in Hessians,
            the GGN and `EdgeRatio`, on whole batches of the size of training, and for `eval` in Fishers, Grams and K-FAC.

    Attributes:
        history: every record so far.

    Raises:
        ConfigurationError: before step 1, for what can never be measured.

    Cost: of a probe with the default measurements: about 75 gradients of its rows, mostly Hessian products.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        measure: list[Measurement] | None = None,
        num_microbatches: int = 4,
        microbatch_size: int = 8,
        draw: Draw = "fresh",
        loss_fn: Loss | Literal["trainer"] = None,
        params_filter: ParamsFilter | None = None,
        block_structure: BlockStructure = "layer",
        seed: int = 0,
        schedule: Schedule | None = None,
        max_overhead: float | None = None,
        max_seconds: float | None = None,
        spike: LossSpike | None = None,
        probe_dataset: Any = None,
        probe_dataloader: Any = None,
        max_sequence_length: int | None = None,
        batch_norm: BatchNorm | None = None,
    ) -> None:
        self._settings = Settings(
            every_n_steps=every_n_steps,
            measure=measure,
            num_microbatches=num_microbatches,
            microbatch_size=microbatch_size,
            draw=draw,
            loss_fn=None if loss_fn == "trainer" else loss_fn,
            params_filter=params_filter,
            block_structure=block_structure,
            seed=seed,
            schedule=schedule,
            max_overhead=max_overhead,
            max_seconds=max_seconds,
            spike=spike,
            probe_dataset=probe_dataset,
            probe_dataloader=probe_dataloader,
            max_sequence_length=max_sequence_length,
            batch_norm=batch_norm,
        )
        self._follows_trainer = loss_fn == "trainer"
        self._memory = MemorySink()
        self._attached: Trainer | None = None
        self._trainer: Trainer | None = None
        self._monitor: CurvatureMonitor | None = None
        self._watch: Any = None
        self._logged_loss: float | None = None

    @property
    def history(self) -> list[Record]:
        """Every record so far, in order."""
        return self._memory.records

    def attach(self, trainer: Trainer) -> "CurvatureCallback":
        """Name the Trainer, where it cannot be found by itself. Returns the callback."""
        self._attached = trainer
        return self

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the monitor, check everything, measure step 0."""
        assert model is not None
        self._stop_watching()  # left by a run that ended with an exception, of which callbacks do not hear
        self._logged_loss = None
        self._trainer = self._attached or calling_trainer(self)
        try:
            self._begin(args, state, model, train_dataloader, optimizer)
        except BaseException:
            self._stop_watching()
            self._monitor = self._trainer = None
            raise

    def _begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, loader: Any, optimizer: Optimizer | None
    ) -> None:
        measured = measured_loss(
            self._settings.loss_fn, self._follows_trainer, args=args, trainer=self._trainer, world=current_world()
        )
        probes = self._probes(args, model, loader)
        sinks: list[Sink] = [
            self._memory,
            JSONLinesSink(Path(args.output_dir or ".") / "curvature.jsonl"),
            ReporterSink(lambda: reporters_of(self._trainer)),
            TrainerLog(self._trainer, state),
        ]
        setup = Setup(
            model=model,
            settings=self._settings,
            probes=probes,
            sinks=sinks,
            loss=measured.loss,
            loop=measured.loop,
            optimizer=optimizer,
        )
        self._monitor = CurvatureMonitor.of(setup)
        self._resume(args, state)
        self._monitor.check(state.global_step)
        self._step(state)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe if due: gradients are freed, the parameters are those after `global_step` steps."""
        self._step(state)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the training loss, which the Trainer tells every `logging_steps`, for the coming step."""
        self._logged_loss = (logs or {}).get("loss", self._logged_loss)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the vectors that eigensolvers start from beside the Trainer's state, which is JSON."""
        path = tensor_file(args, state, self._state_key)
        if self._monitor is not None and state.is_world_process_zero and path.parent.is_dir():
            plain = vars(state)["stateful_callbacks"][self._state_key]  # just written: clocks have gone on since
            save_with_tensors(path, state=self._monitor.state_dict(), plain=plain)

    @override
    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Release references: a cycle of Trainer and callback would keep the model alive until garbage is collected."""
        self._stop_watching()
        self._monitor = self._trainer = None

    @property
    def tensorboard_writer(self) -> Any:
        """The writer of the Trainer's own TensorBoard callback, None while there is none."""
        return tensorboard_writer(reporters_of(self._trainer))

    @property
    def _state_key(self) -> str:
        return f"{STATES}{self._settings.key}{' trainer' if self._follows_trainer else ''}"

    @property
    def _description(self) -> dict[str, str]:
        return self._settings.description | ({"loss_fn": "trainer"} if self._follows_trainer else {})

    def _step(self, state: TrainerState) -> None:
        if self._monitor is None:
            return
        self._monitor.step(state.global_step, self._logged_loss)
        self._logged_loss = None
        saved: Any = state.stateful_callbacks
        plain = self._monitor.state_dict(tensors=False)  # this checkpoint is JSON
        saved[self._state_key] = plain | {DESCRIPTION: self._description}

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """From the file beside the Trainer's own state, or without its tensors from that."""
        assert self._monitor is not None
        saved: Any = state.stateful_callbacks
        if state.global_step == 0:
            return
        if self._state_key not in saved:
            warn_of_change(self._description, states_of_nobody(saved, self._trainer))
            return
        plain, paths = saved[self._state_key], tensor_files(args, state, self._state_key, self._trainer)
        self._monitor.load_state_dict(load_with_tensors(paths, plain) or plain)

    def _probes(self, args: TrainingArguments, model: nn.Module, loader: Any) -> Probes:
        probes = self._settings.probes(loader)
        if probes is not None:
            return probes
        if departures(args, self._trainer) and self._trainer is not None:
            self._watch = ComputeLossWatch(self._trainer, self._offer)
            return self._settings.captured_probes(loader)
        if args.label_smoothing_factor and self._settings.loss_fn is None:
            raise ConfigurationError(
                "the training data is a stream, label smoothing takes the labels away before the model sees them, and the "
                "Trainer was not found, so the loss of a captured batch cannot be determined: call `callback.attach(trainer)`."
            )
        self._watch = model.register_forward_pre_hook(self._offer_arguments, with_kwargs=True)
        return self._settings.captured_probes(loader)

    def _offer_arguments(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook that keeps training batches; a probe runs in evaluation mode and is not one."""
        if module.training:
            self._offer({name: value for name, value in kwargs.items() if name != "num_items_in_batch"})

    def _offer(self, batch: Any) -> None:
        if self._monitor is not None:
            self._monitor.offer(batch)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
