"""Every configuration of Lightning in which training must be the same bits with and without the callback."""

import dataclasses
import os
import random
import sys
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

import curvature_callbacks
from curvature_callbacks import AtSteps, LogSpaced, LossSpike, Measurement, Record
from curvature_callbacks.lightning.callback import CurvatureCallback
from tests.lightning_runs import FrozenNet, ListLogger, ManualNet, MeteredNet, Net, lightning_trainer, pair_loss
from tests.training_cases import (
    ROWS,
    AugmentedRows,
    Checksum,
    Rows,
    Run,
    Stream,
    assert_equal,
    assert_probed,
    assert_same_training,
    callback_options,
    cheap,
    global_generators,
    loader,
    num_hooks,
    seed_everything,
)


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        title: for a table of documentation.
        changes: of the Trainer's arguments.
        net, data: make a fresh one each.
        arguments: more arguments of the Trainer, made afresh.
        callback: options of the callback.
        steps: at which a probe must have succeeded.
        has_likelihood: whether batches are inputs and targets, so that the loss can be given by name and `wide()` measured.
        fit: trains, and returns the Trainer.
        whole: the same training by other means, to be the same as well but for generators and what is logged.
        verified: raises where something else is not as it should be in the run with the callback.
        tolerated: beginnings of warnings that this configuration gives without a callback too.
        is_slow: whether it takes seconds rather than tenths of one.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    net: Callable[[], pl.LightningModule] = Net
    data: Callable[[], Any] = loader
    arguments: Callable[[], dict[str, Any]] = dict
    callback: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[int] = (0, 2, 4, 6)
    has_likelihood: bool = True
    fit: Callable[["Session"], pl.Trainer] = lambda session: session.fitted()
    whole: Callable[["Session"], pl.Trainer] | None = None
    verified: Callable[["Session", Run], None] = lambda session, run: None
    tolerated: Sequence[str] = ()
    is_slow: bool = False


class Session:
    """The parts of one run."""

    def __init__(self, case: Case, directory: Path, measure: list[Measurement] | None) -> None:
        seed_everything()
        self.case, self.directory, self.measure = case, directory, measure
        self.logger, self.net, self.data = ListLogger(), case.net(), case.data()
        self.callbacks: list[CurvatureCallback] = []

    def trainer(self, callbacks: Sequence[pl.Callback] = (), *, is_fresh: bool = True, **changes: Any) -> pl.Trainer:
        """A Trainer with a callback: a fresh one or the one before."""
        if self.measure is not None and (is_fresh or not self.callbacks):
            self.callbacks.append(CurvatureCallback(**callback_options(measure=self.measure, **self.case.callback)))
        given = dict(self.case.changes) | self.case.arguments() | changes
        more = given.pop("callbacks", [])
        return lightning_trainer(self.directory, [*self.callbacks[-1:], *more, *callbacks], logger=self.logger, **given)

    def fitted(self, trainer: pl.Trainer | None = None, **options: Any) -> pl.Trainer:
        """`trainer`, or a new one, after training."""
        trainer = self.trainer() if trainer is None else trainer
        trainer.fit(self.net, self.data, **options)
        return trainer

    def begin_again(self) -> None:
        """A new module and new data, as in another process, and generators that hold something else."""
        seed_everything(2)
        self.net, self.data = self.case.net(), self.case.data()

    @property
    def records(self) -> list[Record]:
        return [record for callback in self.callbacks for record in callback.history]


def assert_same_bits(case: Case, directory: Any, measure: Sequence[Measurement] | None = None, **callback: Any) -> None:
    """Train with and without the callback; raise an `AssertionError` where anything differs or was not measured.

    Args:
        case: what to train.
        directory: to train in.
        measure: measurements; default cheap ones.
        callback: more options of the callback.
    """
    case = dataclasses.replace(case, callback=dict(case.callback) | callback)
    measurements = cheap() if measure is None else list(measure)
    with warnings.catch_warnings():
        for message in case.tolerated:
            warnings.filterwarnings("ignore", message=message)
        plain = run(Session(case, Path(directory) / "plain", None), case.fit)
        session = Session(case, Path(directory) / "probed", measurements)
        probed = run(session, case.fit)
        assert_same_training(plain, probed)
        assert_probed(session.records, case.steps, {"probe", *(one.name for one in measurements)})
        case.verified(session, probed)
        if case.whole is not None:
            whole = run(Session(case, Path(directory) / "whole", None), case.whole)
            assert_equal(whole.state, plain.state, "state")
            assert_equal(whole.optimizers, plain.optimizers, "optimizers")


@contextmanager
def settings_of_the_process() -> Iterator[None]:
    """A Trainer that is deterministic makes everything after it deterministic."""
    enabled, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    environment = dict(os.environ)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        torch.backends.cudnn.benchmark = benchmark
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


def run(session: Session, fit: Callable[[Session], pl.Trainer]) -> Run:
    """Train and take down everything that must not depend on the callback."""
    with redirect_stdout(StringIO()), settings_of_the_process():
        trainer = fit(session)
    net = trainer.lightning_module
    flags = [child.training for child in net.modules()], [one.requires_grad for one in net.parameters()], num_hooks(net)
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    metrics = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
    return Run(
        state=dict(net.state_dict()) | {"flags": flags, "attributes": public_attributes(net)},
        optimizers=[
            *(one.state_dict() for one in trainer.optimizers),
            *map(plain_values, schedules),
            scaler and scaler.state_dict(),
        ],
        logged=[session.logger.training, *map(of_training, metrics), checkpoint["loops"], sorted(vars(net))],
        generators=[*global_generators(), *own_generators(session.data)],
        records=session.records,
    )


def of_training(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without the callback's."""
    return {name: value for name, value in metrics.items() if not name.startswith("curvature")}


def plain_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a schedule, without its functions."""
    return {name: value for name, value in state.items() if isinstance(value, int | float | str | list)}


def public_attributes(net: nn.Module) -> dict[str, Any]:
    """What a module has collected."""
    kinds = int, float, str, list, Tensor
    return {name: value for name, value in vars(net).items() if not name.startswith("_") and isinstance(value, kinds)}


def own_generators(data: Any) -> list[Any]:
    """States of the generators that a data set holds."""
    given = data.iterables if isinstance(data, CombinedLoader) else data
    loaders = given.values() if isinstance(given, dict) else given if isinstance(given, list) else [given]
    held = [value for one in loaders for value in vars(getattr(one, "dataset", one)).values()]
    torches = [value.get_state() for value in held if isinstance(value, torch.Generator)]
    numpys = [value.bit_generator.state for value in held if isinstance(value, np.random.Generator)]
    return [*torches, *numpys, *(value.getstate() for value in held if isinstance(value, random.Random))]


# ------------------------------------------------------------------------------------------------------------------ data


class Noise:
    """A transform with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(2)

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand(6, generator=self.generator)


class Compose:
    """As torchvision's: a list of transforms."""

    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


class TransformedRows(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.transform = Compose([Noise()])

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.x[index]), self.y[index]


class RowsModule(pl.LightningDataModule):
    """The rows, for a command line."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(AugmentedRows(), batch_size=self.batch_size)


def pair() -> dict[str, Any]:
    """Six batches of one and four of the other."""
    return {"a": loader(AugmentedRows()), "b": loader(Rows(16))}


def evaluated() -> DataLoader[Any]:
    return loader(Rows(10), shuffle=False)


# ---------------------------------------------------------------------------------------------------------------- models


class TransferringNet(Net):
    """Batches become usable, and noisy, in the hooks of the transfer."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch[0], "y": batch[1]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"x": batch["x"] + 0.1 * torch.rand(6)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class TwoLoadersNet(Net):
    """Reads both of two batches, however they come; a loader that has ended gives None."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        both = [one for one in (batch.values() if isinstance(batch, dict) else batch) if one is not None]
        rows = [torch.cat(parts) for parts in zip(*both, strict=True)]
        return super().training_step(rows, batch_idx)


class FirstLoaderNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx)


class CurvatureLossNet(ManualNet):
    """Two optimizers, and a method that says what the loss is."""

    def curvature_loss(self, batch: Any) -> Tensor:
        return pair_loss(self, batch)


class CollectingNet(Net):
    """Keeps the outputs of an epoch in a list, as Lightning's migration guide says."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.outputs.append(loss := super().training_step(batch, batch_idx))
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("epoch_mean", torch.stack(self.outputs).mean())
        self.outputs.clear()


class RememberingNet(Net):
    """Remembers losses wherever a module can: nested, in a submodule, in a tensor that changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, list[Tensor]] = defaultdict(list)
        self.layers.seen = deque(maxlen=100)
        self.running = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.by_name["loss"].append(loss.detach())
        self.layers.seen.append(loss.detach())
        self.running += loss.detach()
        return loss

    def on_train_epoch_end(self) -> None:
        lists = {"nested": self.by_name["loss"], "in_submodule": list(self.layers.seen)}
        self.log_dict({name: torch.stack(losses).mean() for name, losses in lists.items()} | {"running": self.running})


class DirectlyLoggingNet(Net):
    """Writes to the logger itself rather than through `self.log`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
        return loss


class UnregisteredMetricNet(Net):
    """A metric `modules()` does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = {"accuracy": MulticlassAccuracy(3)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.metrics["accuracy"].update(self(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("accuracy", self.metrics["accuracy"].compute())
        self.metrics["accuracy"].reset()


class HalfFrozenNet(Net):
    """The first layers are a backbone: in evaluation mode and without gradients from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[:2].requires_grad_(False)
        self.layers[:2].eval()


class CompiledNet(Net):
    """A submodule compiled in place."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.layers.compile(backend=backend)


class SilentNet(Net):
    """Logs after its `training_step`: Dynamo cannot look through Lightning's `log`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("train_loss", outputs["loss"])


class ScheduledNet(Net):
    """A schedule that moves the momentum too."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ValidatedNet(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class NoisyNet(Net):
    """Its `training_step` draws, reads the Trainer and its own arguments, and counts."""

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.generator = torch.Generator().manual_seed(4)
        self.augment = Noise()
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        rate = self.optimizers().param_groups[0]["lr"]
        noise = torch.rand(6) + torch.rand(6, generator=self.generator) + np.random.rand() + random.random()
        x = self.augment(batch[0]) + self.hparams.strength * noise.float() * (1 + self.current_epoch)
        self.log("seen", float(self.calls) + rate + self.generator.get_state().float().mean())
        return super().training_step((x, batch[1]), batch_idx)


class Jitter(nn.Module):
    """Draws from a generator of its own, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape[1:], generator=self.generator)
        return x + 0.1 * noise if self.training else x


class JitteredNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers.insert(0, Jitter())


class ManyHooksNet(Net):
    """Gradients looked at and changed on their way."""

    def on_after_backward(self) -> None:
        self.log("norm", self.layers[0].weight.grad.norm())

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(self.layers.parameters(), 0.05)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("before", self.layers[0].weight.sum())


class SearchingNet(Net):
    """An optimizer that evaluates the loss several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class PlateauNet(Net):
    """A schedule that follows the loss."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "train_loss_epoch"}}


class LateNet(Net):
    """Its layers are made when training begins, and its callbacks are its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            self.layers = Net().layers

    def configure_callbacks(self) -> list[pl.Callback]:
        return [LearningRateMonitor("step"), EarlyStopping("train_loss_step", patience=100)]


class SpikingNet(Net):
    """Of one batch the loss is out of all proportion."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1000 if self.global_step == 3 else 1)


class TunedNet(Net):
    """What the finders change, as attributes."""

    def __init__(self, lr: float = 0.02, batch_size: int = 4) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(AugmentedRows(), batch_size=self.batch_size)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class ExactNet(Net):
    """Without noise, so that a checkpoint holds everything there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3] = nn.Identity()


# -------------------------------------------------------------------------------------------------------------- training


def compiled(backend: str) -> Callable[[Session], pl.Trainer]:
    def fit(session: Session) -> pl.Trainer:
        session.net = torch.compile(session.net, backend=backend)  # type: ignore[assignment]
        return session.fitted()

    return fit


def validated(session: Session) -> pl.Trainer:
    return session.fitted(val_dataloaders=evaluated())


def on_after_an_epoch(session: Session) -> pl.Trainer:
    """The same Trainer told to go on for another epoch."""
    trainer = session.fitted(session.trainer(max_epochs=1, max_steps=-1))
    trainer.fit_loop.max_epochs = 2
    return session.fitted(trainer)


def by_another_trainer(session: Session) -> pl.Trainer:
    """A new Trainer for the same module, and the same callback."""
    session.fitted()
    return session.fitted(session.trainer(is_fresh=False))


def resumed(session: Session, step: int) -> pl.Trainer:
    """On from a checkpoint, with everything made anew."""
    path = session.directory / "at.ckpt"
    session.fitted(session.trainer(max_steps=step)).save_checkpoint(path)
    session.begin_again()
    return session.fitted(ckpt_path=path, weights_only=False)


def learning_rate_found(session: Session) -> pl.Trainer:
    trainer = session.trainer()
    Tuner(trainer).lr_find(session.net, num_training=30, min_lr=1e-4, max_lr=1e-1)
    trainer.fit(session.net)
    return trainer


def by_the_module(session: Session) -> pl.Trainer:
    """The loader is the module's own."""
    trainer = session.trainer()
    trainer.fit(session.net)
    return trainer


def by_command_line(session: Session, **more: Any) -> pl.Trainer:
    """`LightningCLI` with a file that says everything."""
    cli = command_line("fit", "--config", str(written(session, **more)))
    session.logger = cli.trainer.logger
    session.callbacks = [one for one in cli.trainer.callbacks if isinstance(one, CurvatureCallback)]
    assert cli.model.lr == 0.01
    return cli.trainer


def command_line(*arguments: str, **options: Any) -> LightningCLI:
    with patch.object(sys, "argv", ["train.py", *arguments]):
        return LightningCLI(TunedNet, RowsModule, save_config_callback=None, **options)


def written(session: Session, **more: Any) -> Path:
    """A file that says everything."""
    callbacks = []
    if session.measure is not None:
        measure = [*session.measure, *more.pop("measure", [])]
        given = callback_options(**session.case.callback, **more) | {"measure": [in_yaml(one) for one in measure]}
        callbacks = [{"class_path": "curvature_callbacks.lightning.CurvatureCallback", "init_args": given}]
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = quiet | {"accelerator": "cpu", "devices": 1, "max_steps": 7, "log_every_n_steps": 1, "callbacks": callbacks}
    trainer |= {"logger": {"class_path": "tests.lightning_runs.ListLogger"}, "default_root_dir": str(session.directory)}
    content = {"seed_everything": 1, "trainer": trainer, "model": {"lr": 0.01}, "data": {"batch_size": 4}}
    session.directory.mkdir(parents=True)
    path = session.directory / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def in_yaml(value: Any) -> dict[str, Any]:
    """What a user would write for a measurement or a schedule."""
    kind = type(value)
    fields = [one for one in dataclasses.fields(kind) if one.init and getattr(value, one.name) != one.default]
    home = "curvature_callbacks" if hasattr(curvature_callbacks, kind.__name__) else kind.__module__
    return {"class_path": f"{home}.{kind.__name__}", "init_args": {one.name: getattr(value, one.name) for one in fields}}


def own_is_measured(session: Session, run: Run) -> None:
    assert_probed(run.records, session.case.steps, {"checksum"})
    assert isinstance(session.callbacks[0]._settings.probe_dataset, AugmentedRows)


def scaled() -> dict[str, Any]:
    """Mixed precision in float16 with a gradient scaler that has to back off at first."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def averaged() -> dict[str, Any]:
    return {"callbacks": [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]}


SHARPNESS = "curvature/hessian_lambda_max"


def checkpointed(session: Session) -> pl.Trainer:
    """Checkpoints chosen and named by the sharpness where there is a callback."""
    saving = ModelCheckpoint(
        dirpath=session.directory / "best",
        monitor=SHARPNESS if session.measure is not None else "train_loss_step",
        filename="{step}-{" + SHARPNESS + ":.3f}",
        auto_insert_metric_name=False,
        every_n_train_steps=3,
        save_top_k=-1,
    )
    return session.fitted(session.trainer([saving], enable_checkpointing=True))


def named_by_sharpness(session: Session, run: Run) -> None:
    found = {one.step: one.scalars["lambda_max"] for one in run.records if one.measurement == "hessian" and one.block is None}
    names = {path.name for path in (session.directory / "best").iterdir()}
    assert names == {f"3-{found[2]:.3f}.ckpt", f"6-{found[4]:.3f}.ckpt"}


def lr_is_found(session: Session, run: Run) -> None:
    assert session.net.lr != 0.02


def size_is_found(session: Session, run: Run) -> None:
    assert session.net.batch_size == 8


def nothing_is_written(session: Session, run: Run) -> None:
    assert not list(session.directory.rglob("*.jsonl"))


# ----------------------------------------------------------------------------------------------------------------- table

IN_YAML: dict[str, Any] = {
    "every_n_steps": 200,
    "measure": [Checksum()],
    "schedule": in_yaml(AtSteps(steps=[0, 3, 5])),
    "spike": in_yaml(LossSpike(num_std=40.0)),
    "probe_dataset": {"class_path": "tests.training_cases.AugmentedRows"},
    "max_seconds": 100.0,
    "draw": "fixed",
}
BY_EPOCH = {"max_steps": 13}
BY_PAIR = {"loss_fn": pair_loss}
EVERY_SECOND = range(0, 13, 2)
IN_JSONARGPARSE = [r"(?s)\s*By default only one Jsonargparse", r"(?s).*was deprecated in v4"]  # what Lightning calls
IN_DYNAMO = "The .grad attribute of a Tensor that is not a leaf"


def in_place(backend: str) -> Case:
    net = partial(CompiledNet, backend)
    return Case(f"a submodule compiled in place ({backend})", net=net, tolerated=[IN_DYNAMO], is_slow=backend != "eager")


def as_a_whole(backend: str) -> Case:
    title = f"`torch.compile(module)` given to `fit` ({backend})"
    return Case(
        title, {"max_steps": 3}, net=SilentNet, fit=compiled(backend), steps=(0, 2), tolerated=[IN_DYNAMO], is_slow=True
    )


def several(title: str, make: Callable[[], Any]) -> Case:
    return Case(f"several loaders: {title}", net=TwoLoadersNet, data=make, has_likelihood=False)


CASES: dict[str, Case] = {
    "plain": Case("AdamW in float32"),
    "accumulation": Case("gradient accumulation", {"accumulate_grad_batches": 3}),
    "16-mixed": Case(
        "`16-mixed` on a CPU, which Lightning makes `bf16-mixed`", {"precision": "16-mixed"}, tolerated=["You passed"]
    ),
    "16-mixed, scaler": Case("`16-mixed` with a gradient scaler, by a plugin", arguments=scaled),
    "16-true": Case("`16-true` (SGD)", {"precision": "16-true"}, net=ScheduledNet),
    "bf16-mixed": Case("`bf16-mixed`", {"precision": "bf16-mixed"}),
    "bf16-true": Case("`bf16-true`", {"precision": "bf16-true"}),
    "64-true": Case("`64-true`", {"precision": "64-true"}),
    "clipping": Case("gradient clipping by norm", {"gradient_clip_val": 0.1}),
    "clipping by value": Case("gradient clipping by value", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "one cycle": Case("a one-cycle schedule of learning rate and momentum", net=ScheduledNet),
    "weight averaging": Case(
        "`StochasticWeightAveraging`, with its last epoch for BatchNorm",
        {"max_epochs": 3, "max_steps": -1},
        arguments=averaged,
        steps=range(0, 19, 2),
    ),
    "exponential averaging": Case(
        "`EMAWeightAveraging`, with validation of the average",
        {"val_check_interval": 2},
        net=ValidatedNet,
        arguments=lambda: {"callbacks": [EMAWeightAveraging(decay=0.9)]},
        fit=validated,
    ),
    "accumulation by epoch": Case(
        "`GradientAccumulationScheduler`",
        arguments=lambda: {"callbacks": [GradientAccumulationScheduler({0: 2, 1: 3})]},
    ),
    "LBFGS": Case("LBFGS, which evaluates the loss several times a step", net=SearchingNet),
    "plateau": Case("`ReduceLROnPlateau`", BY_EPOCH, net=PlateauNet, steps=EVERY_SECOND),
    "gradients in hooks": Case("gradients logged and clipped in hooks of the module", net=ManyHooksNet),
    "late layers": Case("`configure_model` and `configure_callbacks`", net=LateNet),
    "noise": Case("`training_step` draws, counts and reads the Trainer and its hyperparameters", net=NoisyNet),
    "noisy layer": Case("a layer with a generator of its own", net=JitteredNet, callback={"loss_fn": "cross_entropy"}),
    "anomalies": Case("`detect_anomaly`", {"detect_anomaly": True}),
    "deterministic": Case("`deterministic`", {"deterministic": True}),
    "reloaded": Case(
        "loaders made anew every epoch by a data module",
        {"max_steps": 13, "reload_dataloaders_every_n_epochs": 1},
        data=partial(RowsModule, batch_size=4),
        steps=EVERY_SECOND,
    ),
    "manual optimization": Case(
        "manual optimization of two optimizers, `loss_fn`", {"max_steps": 14}, net=ManualNet, callback=BY_PAIR, steps=range(7)
    ),
    "curvature_loss": Case(
        "manual optimization of two optimizers, `curvature_loss`", {"max_steps": 14}, net=CurvatureLossNet, steps=range(7)
    ),
    "compiled, eager": as_a_whole("eager"),
    "compiled, aot_eager": as_a_whole("aot_eager"),
    "compiled in place, eager": in_place("eager"),
    "compiled in place, aot_eager": in_place("aot_eager"),
    "frozen at every epoch": Case(
        "a BatchNorm put in evaluation mode at every epoch", BY_EPOCH, net=FrozenNet, steps=EVERY_SECOND
    ),
    "frozen": Case("frozen layers in evaluation mode", net=HalfFrozenNet, tolerated=["Found 2 module"]),
    "metrics": Case("torchmetrics in `training_step`", BY_EPOCH, net=MeteredNet, steps=EVERY_SECOND),
    "unregistered metric": Case("a torchmetric in a dictionary", BY_EPOCH, net=UnregisteredMetricNet, steps=EVERY_SECOND),
    "collecting": Case("outputs collected in a list", BY_EPOCH, net=CollectingNet, steps=EVERY_SECOND),
    "remembering": Case("losses kept in containers and submodules", BY_EPOCH, net=RememberingNet, steps=EVERY_SECOND),
    "logging directly": Case("`training_step` writes to the logger itself", net=DirectlyLoggingNet),
    "augmentation": Case("data augmented from all generators", data=lambda: loader(AugmentedRows())),
    "transform": Case("a transform with a generator of its own", data=lambda: loader(TransformedRows())),
    "transform of a subset": Case(
        "a subset of rows with such a transform", data=lambda: loader(Subset(TransformedRows(), range(20)))
    ),
    "transfer hooks": Case("batches changed by the hooks of the transfer", net=TransferringNet, has_likelihood=False),
    "workers": Case(
        "a persistent worker",
        {"max_steps": 8},
        data=lambda: loader(AugmentedRows(), num_workers=1, persistent_workers=True),
        is_slow=True,
    ),
    "stream": Case("an `IterableDataset`", data=lambda: loader(Stream(AugmentedRows()), shuffle=False)),
    "dict of loaders": several("a dictionary", pair),
    "batches of two sizes": Case(
        "several loaders of different batch size, one of which has the loss",
        net=FirstLoaderNet,
        data=lambda: {"a": loader(), "b": loader(batch_size=8)},
        has_likelihood=False,
    ),
    "list of loaders": several("a list", lambda: list(pair().values())),
    "min_size": several('`CombinedLoader(..., "min_size")`', lambda: CombinedLoader(pair(), "min_size")),
    "max_size": several('`CombinedLoader(..., "max_size")`', lambda: CombinedLoader(pair(), "max_size")),
    "max_size_cycle": several('`CombinedLoader(..., "max_size_cycle")`', lambda: CombinedLoader(pair(), "max_size_cycle")),
    "list, max_size_cycle": several(
        'a list in `CombinedLoader(..., "max_size_cycle")`', lambda: CombinedLoader(list(pair().values()), "max_size_cycle")
    ),
    "overfit_batches": Case("`overfit_batches`", {"overfit_batches": 2}, tolerated=["You requested to overfit"]),
    "limit_train_batches": Case("`limit_train_batches`", {"limit_train_batches": 2}),
    "fast_dev_run": Case(
        "`fast_dev_run`",
        {"fast_dev_run": 3, "max_steps": -1, "max_epochs": 1},
        steps=(0, 2),
        verified=nothing_is_written,
    ),
    "validation": Case("validation several times an epoch", {"val_check_interval": 2}, net=ValidatedNet, fit=validated),
    "checkpoints": Case(
        f"`ModelCheckpoint` that monitors `{SHARPNESS}` and has it in its file names",
        fit=checkpointed,
        verified=named_by_sharpness,
    ),
    "lr_find": Case("`Tuner.lr_find` before `fit`", net=TunedNet, fit=learning_rate_found, verified=lr_is_found),
    "learning rate finder": Case(
        "`LearningRateFinder`",
        net=TunedNet,
        arguments=lambda: {"callbacks": [LearningRateFinder(min_lr=1e-4, max_lr=1e-1, num_training_steps=30)]},
        fit=by_the_module,
        verified=lr_is_found,
    ),
    "batch size finder": Case(
        "`BatchSizeFinder`",
        net=TunedNet,
        arguments=lambda: {"callbacks": [BatchSizeFinder(steps_per_trial=2, init_val=4, max_trials=2)]},
        fit=by_the_module,
        verified=size_is_found,
    ),
    "command line": Case(
        "`LightningCLI` with callback and measurements in YAML",
        fit=partial(by_command_line, block_structure={"first": ["layers.0"]}, seed=3),
        tolerated=IN_JSONARGPARSE,
    ),
    "command line, more": Case(
        "`LightningCLI` with a schedule, other data, limits and a measurement of one's own in YAML",
        fit=partial(
            by_command_line,
            **IN_YAML,
        ),
        steps=(0, 3, 5),
        verified=own_is_measured,
        tolerated=IN_JSONARGPARSE,
    ),
    "schedule": Case(
        "a schedule", callback={"every_n_steps": 200, "schedule": LogSpaced(per_decade=4, first=2)}, steps=(0, 2, 4)
    ),
    "spike": Case(
        "a probe when the loss leaves its range",
        net=SpikingNet,
        callback={"every_n_steps": 200, "spike": LossSpike(num_std=20.0, window=2)},
        steps=(0, 4),
    ),
    "probe dataset": Case(
        "other data to measure on, with generators of its own",
        data=lambda: loader(AugmentedRows()),
        callback={"probe_dataset": AugmentedRows()},
    ),
    "probe dataloader": Case(
        "a loader of other data to measure on",
        data=lambda: loader(Stream(AugmentedRows()), shuffle=False),
        callback={"probe_dataloader": loader(AugmentedRows())},
    ),
    "limits": Case("a share of wall time and seconds of a probe", callback={"max_overhead": 0.99, "max_seconds": 100.0}),
    "twice": Case("`fit` called again to go on", fit=on_after_an_epoch, steps=range(0, 12, 2)),
    "another trainer": Case(
        "another Trainer for the same module, with the same callback", fit=by_another_trainer, steps=(0, 2, 4, 6, 0, 2, 4, 6)
    ),
    "resumed": Case(
        "resuming from a checkpoint, the same as the training not interrupted",
        {"max_steps": 11},
        net=ExactNet,
        data=lambda: loader(batch_size=ROWS, shuffle=False),  # a single batch: Lightning resumes with the first of an epoch
        fit=partial(resumed, step=5),
        whole=lambda session: session.fitted(),
        steps=range(0, 11, 2),
    ),
    "resumed within an epoch": Case(
        "resuming from a checkpoint within an epoch", {"max_steps": 9}, fit=partial(resumed, step=4), steps=range(0, 9, 2)
    ),
}
