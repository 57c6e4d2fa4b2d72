"""CurvatureCallback of Lightning: a monitor in its hooks, with the loss, the loader and the loggers of the run."""

import logging
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor
from typing_extensions import override

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.isolation.snapshot import undisturbed
from curvature_callbacks.lightning.framework import Callback, LightningModule, Trainer
from curvature_callbacks.lightning.loss import loop_loss_of_module, loss_of_module
from curvature_callbacks.lightning.sinks import HeadlineSink, logger_sinks
from curvature_callbacks.measurements import Measurement
from curvature_callbacks.model.batch_norm import BatchNorm
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.probes import CapturedProbes, Draw, Probes
from curvature_callbacks.record import Record
from curvature_callbacks.run.fingerprint import DESCRIPTION, warn_of_change
from curvature_callbacks.run.monitor import CurvatureMonitor
from curvature_callbacks.run.schedules import LossSpike, Schedule
from curvature_callbacks.run.settings import Settings
from curvature_callbacks.run.setup import Setup
from curvature_callbacks.sinks import MemorySink, Sink

_logger = logging.getLogger("curvature_callbacks")


@final
class CurvatureCallback(Callback):
    """Measures the curvature of the training loss every `every_n_steps` optimizer steps, and changes nothing else.

    At the start of a batch that is due it draws `num_microbatches * microbatch_size` rows of the training data (indexing
    the dataset, never iterating the loader; the latest training batches where the data is a stream or several loaders),
    measures, and logs to the run's loggers at the step the parameters belong to. The loss is `loss_fn`, else the module's
    `curvature_loss(batch)`, else `training_step` itself with logging muted and torchmetrics put back. Per-row losses
    (`loss_fn` returning shape (N,)) make row-wise fallbacks cheaper and are needed where a mean is not over rows.

    Tags: see the measurements; of the probe itself `curvature/probe_seconds`, `curvature/failed`,
    `curvature_probe/sink_seconds` (of the probe before), `curvature_probe/matvecs`, `curvature_probe/rows`,
    `curvature_probe/microbatch_size`, `curvature_probe/overhead`, `curvature_probe/skipped`,
    `curvature_probe/gradient_equivalents`, `curvature_probe/non_finite`, `curvature_probe/probe_loss`,
    `curvature_probe/training_loss` (the loop's latest). TensorBoard gets curves, heat maps, histograms and a
    table, other loggers the scalars, `trainer.callback_metrics` and the progress bar the headline numbers, and
    `curvature.jsonl` in the run's directory everything.

    Args:
        every_n_steps: optimizer steps between probes, counted as `trainer.global_step` counts them; the first batch always
            measures. The horizontal axis is that of the loss curves: batches after which an optimizer stepped.
        measure: measurements; default `[FisherSpectrum(), TopEigenpairs(), KFACCoverage()]`.
        num_microbatches: microbatches a probe.
        microbatch_size: rows of each.
        draw: `fresh` rows at every probe or `fixed` ones.
        loss_fn: `(module, batch) -> scalar mean | (N,) per-sample losses`, or `cross_entropy`, `mse` or `bce` where batches are
            `(inputs, targets)`: types of Fisher that need single targets or the likelihood have them from a named loss.
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
        loss_fn: Loss = None,
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
            loss_fn=loss_fn,
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
        self._memory = MemorySink()
        self._monitor: CurvatureMonitor | None = None
        self._captured: CapturedProbes | None = None
        self._loaded: dict[str, Any] | None = None
        self._loader: Any = None  # what probes are drawn from
        self._last_state: dict[str, Any] = {}
        self._loss: Any = None  # of the batch before

    @property
    def history(self) -> list[Record]:
        """Every record so far, in order."""
        return self._memory.records

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the monitor and check everything that can be checked without a batch."""
        self._captured = self._loss = None
        loss = loss_of_module(pl_module, self._settings.loss_fn)
        self._loader = trainer.train_dataloader
        probes = self._probes(trainer, pl_module)
        if probes is None:
            probes = self._captured = self._settings.captured_probes(self._loader)
        sinks: list[Sink] = [self._memory, *logger_sinks(trainer), HeadlineSink(trainer)]
        setup = Setup(
            model=pl_module,
            settings=self._settings,
            probes=probes,
            sinks=sinks,
            loss=loss,
            loop=loop_loss_of_module(pl_module, self._settings.loss_fn),
            optimizer=trainer.optimizers or None,
        )
        self._monitor = CurvatureMonitor.of(setup)
        if self._loaded is not None:
            self._monitor.load_state_dict(self._loaded)
            self._loaded = None
        self._monitor.check(_logged_step(trainer))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw from the loader of this epoch, where it is a new one (`reload_dataloaders_every_n_epochs`)."""
        if self._monitor is None or self._captured is not None or trainer.train_dataloader is self._loader:
            return
        self._loader = trainer.train_dataloader
        try:
            probes = self._probes(trainer, pl_module)
            reason = "it is a stream now"
        except ConfigurationError as error:
            probes, reason = None, str(error)
        if probes is not None:
            self._monitor.draw_from(probes)
        else:
            _logger.warning(
                "curvature probes stay with the data of the epochs before, this epoch's cannot be drawn from: %s", reason
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Probe if due: at this point `.grad` is not in use and the parameters are those of the step being logged."""
        if self._monitor is None:
            return
        if self._captured is not None:
            self._monitor.offer(batch)
        self._monitor.step(trainer.global_step, self._loss, logged_as=_logged_step(trainer))
        self._loss = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss for the coming step."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1  # Lightning has divided by it
            self._loss = loss.detach() * parts if parts > 1 else loss.detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @property
    @override
    def state_key(self) -> str:
        """Tells the states of several callbacks in one checkpoint apart."""
        return self._generate_state_key(settings=self._settings.key)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps; after training what it kept last."""
        if self._monitor is None:
            return self._last_state
        return self._monitor.state_dict() | {DESCRIPTION: self._settings.description}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts, when there is a monitor to take it."""
        self._loaded = state_dict or None

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say so where the checkpoint's state is of other arguments; Lightning hands a state to its own key only."""
        states = checkpoint.get("callbacks", {})
        if self.state_key not in states:
            taken = {callback.state_key for callback in getattr(trainer, "callbacks")}  # noqa: B009 - set by a connector
            others = [state for key, state in states.items() if key.startswith(type(self).__qualname__) and key not in taken]
            warn_of_change(self._settings.description, others)

    def _probes(self, trainer: Trainer, pl_module: LightningModule) -> Probes | None:
        return self._settings.probes(self._loader, prepare=lambda batch: _as_the_loop_does(trainer, pl_module, batch))

    def _release(self) -> None:
        self._last_state = self.state_dict() if self._loaded is None else self._loaded  # of a run that had nothing to train
        self._monitor = self._captured = self._loaded = self._loader = None
        for name in ("log", "log_dict"):  # Lightning's own, which hold the module and the Trainer
            self.__dict__.pop(name, None)


def _as_the_loop_does(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Precision, transfer hooks and device, in the order of the training loop."""
    with undisturbed(getattr(trainer, "datamodule", None)):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _logged_step(trainer: Trainer) -> int:
    """Where the loss of the coming batch will be logged."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))
