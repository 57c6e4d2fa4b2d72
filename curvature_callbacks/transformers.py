"""The callback for the Hugging Face Trainer."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from torch import nn
from torch.optim import Optimizer

from curvature_callbacks._optional import require
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.measurements import Measurement
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.losses import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.monitor import CurvatureMonitor
from curvature_callbacks.probes import Draw, Probes, probes_from_loader, stable_seed
from curvature_callbacks.record import Record, headline
from curvature_callbacks.settings import Settings
from curvature_callbacks.sinks import JSONLinesSink, MemorySink, Sink
from curvature_callbacks.sinks.tensorboard import TensorBoardSink
from curvature_callbacks.states import load_whole, save_whole

require("transformers", extra="transformers")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402
from transformers.integrations.integration_utils import TensorBoardCallback  # noqa: E402
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402

_logger = logging.getLogger("curvature_callbacks")


@final
class CurvatureCallback(TrainerCallback):
    """Measures the curvature of the training loss every `every_n_steps` optimizer steps, and changes nothing else.

    After an optimizer step that is due it draws `num_microbatches * microbatch_size` rows of the training data (indexing
    the dataset, never iterating the loader; copies of the latest training batches where the data is a stream), measures in
    float32 without the Trainer's autocast, and logs. The loss is the model's own `.loss` unless `loss_fn` is given: label
    smoothing, `compute_loss_func` and an overridden `compute_loss` are not part of it, and a warning says so.

    Tags: see the measurements; of the probe itself `curvature/probe_seconds`, `curvature/failed`,
    `curvature_probe/sink_seconds` (of the probe before), `curvature_probe/matvecs`, `curvature_probe/rows`,
    `curvature_probe/gradient_equivalents`, `curvature_probe/non_finite`. TensorBoard gets them under these names through the
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
        params_filter: `(name, parameter) -> bool`, which trainable parameters to measure.
        block_structure: `layer`, `component`, `module`, `parameter`, `none`, `{block: [names]}` or a function: `group_blocks`.
        seed: with the step it determines every draw.

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
        loss_fn: Loss = None,
        params_filter: ParamsFilter | None = None,
        block_structure: BlockStructure = "layer",
        seed: int = 0,
    ) -> None:
        self._settings = Settings(
            every_n_steps=every_n_steps,
            measure=measure,
            num_microbatches=num_microbatches,
            microbatch_size=microbatch_size,
            draw=draw,
            loss_fn=loss_fn,
            params_filter=params_filter,
            block_structure=block_structure,
            seed=seed,
        )
        self._memory = MemorySink()
        self._attached: Trainer | None = None
        self._trainer: Trainer | None = None
        self._monitor: CurvatureMonitor | None = None
        self._capture_hook: Any = None

    @property
    def history(self) -> list[Record]:
        """Every record so far, in order."""
        return self._memory.records

    def attach(self, trainer: Trainer) -> "CurvatureCallback":
        """Name the Trainer, where it cannot be found by itself. Returns the callback."""
        self._attached = trainer
        return self

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
        self._remove_hook()  # left by a run that ended with an exception, of which callbacks are told nothing
        self._trainer = self._attached or _calling_trainer(self)
        _report_unmeasured_loss(args, self._trainer, self._settings.loss_fn)
        probes = self._probes(args, model, train_dataloader)
        sinks: list[Sink] = [
            self._memory,
            JSONLinesSink(Path(args.output_dir or ".") / "curvature.jsonl"),
            _TrainerTensorBoard(self),
            _TrainerLog(self._trainer, state),
        ]
        self._monitor = self._settings.monitor(
            model, probes=probes, sinks=sinks, loss=self._settings.loss_fn, optimizer=optimizer
        )
        self._resume(args, state)
        self._monitor.check(state.global_step)
        self._step(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe if due: gradients are freed, the parameters are those after `global_step` steps."""
        self._step(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the vectors that eigensolvers start from beside the Trainer's state, which is JSON."""
        path = self._tensor_file(args, state)
        if self._monitor is not None and state.is_world_process_zero and path.parent.is_dir():
            save_whole(path, whole=self._monitor.state_dict(), plain=self._monitor.state_dict(tensors=False))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let go of the model and the captured batches."""
        self._remove_hook()
        self._monitor = None

    @property
    def tensorboard_writer(self) -> Any:
        """The writer of the Trainer's own TensorBoard callback, None while there is none."""
        callbacks = self._trainer.callback_handler.callbacks if self._trainer is not None else []
        writers = (getattr(callback, "tb_writer", None) for callback in callbacks)
        return next((writer for writer in writers if writer is not None), None)

    @property
    def _state_key(self) -> str:
        return f"curvature_callbacks: {self._settings.key}"

    def _step(self, state: TrainerState) -> None:
        if self._monitor is None:
            return
        self._monitor.step(state.global_step)
        saved: Any = state.stateful_callbacks
        saved[self._state_key] = self._monitor.state_dict(tensors=False)  # this checkpoint is JSON

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """From the file beside the Trainer's own state, or without its tensors from that."""
        assert self._monitor is not None
        saved: Any = state.stateful_callbacks
        if state.global_step == 0 or self._state_key not in saved:
            return
        plain, own = saved[self._state_key], self._tensor_file(args, state)
        folders = [_resumed_from(self._trainer), args.resume_from_checkpoint]
        places = [*(Path(folder) / own.name for folder in folders if isinstance(folder, str)), own]
        self._monitor.load_state_dict(load_whole(places, plain) or plain)

    def _tensor_file(self, args: TrainingArguments, state: TrainerState) -> Path:
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        return folder / f"curvature_{stable_seed(0, self._state_key):08x}.pt"

    def _probes(self, args: TrainingArguments, model: nn.Module, loader: Any) -> Probes:
        probes = probes_from_loader(loader, **self._settings.probe_sizes())
        if probes is not None:
            return probes
        if args.label_smoothing_factor and self._settings.loss_fn is None:
            raise ConfigurationError(
                "the training data is a stream and label smoothing takes the labels away before the model sees them, so the "
                "loss of a captured batch cannot be determined: pass `loss_fn`, or use a map-style dataset."
            )
        self._capture_hook = model.register_forward_pre_hook(self._offer, with_kwargs=True)
        return self._settings.captured_probes()

    def _offer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook that keeps training batches; a probe runs in evaluation mode and is not one."""
        if module.training and self._monitor is not None:
            self._monitor.offer({name: value for name, value in kwargs.items() if name != "num_items_in_batch"})

    def _remove_hook(self) -> None:
        if self._capture_hook is not None:
            self._capture_hook.remove()
            self._capture_hook = None


def _resumed_from(trainer: Trainer | None) -> str | None:
    """The folder that `trainer.train` was told to go on from, which no callback is given."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        folder = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(folder, str) and frame.f_locals.get("self") is trainer:
            return folder
    return None


@final
class _TrainerTensorBoard:
    """The Trainer's TensorBoard, whose writer may appear after the first records."""

    def __init__(self, callback: CurvatureCallback) -> None:
        self._callback = callback
        self._sink: TensorBoardSink | None = None
        self._waiting: list[Sequence[Record]] = []

    def write(self, records: Sequence[Record]) -> None:
        self._waiting.append(records)
        writer = self._callback.tensorboard_writer
        if self._sink is None and writer is not None:
            self._sink = TensorBoardSink(writer)
        while self._sink is not None and self._waiting:
            self._sink.write(self._waiting.pop(0))


@final
class _TrainerLog:
    """Headline numbers through the Trainer to `log_history` and every reporter but TensorBoard, which has them already."""

    every_process = True  # `log_history` is the same everywhere; reporters choose the writer themselves

    def __init__(self, trainer: Trainer | None, state: TrainerState) -> None:
        self._trainer = trainer
        self._state = state

    def write(self, records: Sequence[Record]) -> None:
        values = headline(records)
        if self._trainer is None:
            self._state.log_history.append({**values, "step": self._state.global_step})
            return
        handler, control = self._trainer.callback_handler, self._trainer.control
        callbacks, flags = handler.callbacks, dict(vars(control))
        try:
            handler.callbacks = [callback for callback in callbacks if not isinstance(callback, TensorBoardCallback)]
            Trainer.log(self._trainer, values)  # the base method: TRL's overrides flush their own metrics here
        finally:
            handler.callbacks = callbacks
            vars(control).update(flags)  # logging clears `should_log`, and with it the Trainer's own loss at this step


def _calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer among the calling frames that holds `callback`: callbacks are never given it."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
    _logger.warning(
        "the Trainer was not found: curvature goes to `log_history` and curvature.jsonl only. Call `callback.attach(trainer)`."
    )
    return None


def _report_unmeasured_loss(args: TrainingArguments, trainer: Trainer | None, loss_fn: Loss) -> None:
    """Say so when training minimises something else than the model's own loss."""
    if loss_fn is not None:
        return
    reasons = {
        "`label_smoothing_factor`": bool(args.label_smoothing_factor),
        "`compute_loss_func`": getattr(trainer, "compute_loss_func", None) is not None,
        "an overridden `compute_loss`": trainer is not None and type(trainer).compute_loss is not Trainer.compute_loss,
    }
    found = [name for name, present in reasons.items() if present]
    if found:
        _logger.warning(
            "curvature is measured for the model's own `.loss`, without %s: pass `loss_fn` to measure the loss you train.",
            " and ".join(found),
        )
