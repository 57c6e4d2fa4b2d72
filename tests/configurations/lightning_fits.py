"""Ways to train of the configurations of Lightning: tuners, the command line, checkpoints, several Trainers."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner

import curvature_callbacks
from curvature_callbacks import AtSteps, LossSpike
from curvature_callbacks.lightning.callback import CurvatureCallback
from tests.configurations.lightning_nets import RowsModule, TunedNet, evaluated
from tests.configurations.lightning_sessions import Session
from tests.training_cases import AugmentedRows, Checksum, Run, assert_probed, callback_options


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


IN_YAML: dict[str, Any] = {
    "every_n_steps": 200,
    "measure": [Checksum()],
    "schedule": in_yaml(AtSteps(steps=[0, 3, 5])),
    "spike": in_yaml(LossSpike(num_std=40.0)),
    "probe_dataset": {"class_path": "tests.training_cases.AugmentedRows"},
    "max_seconds": 100.0,
    "draw": "fixed",
}
