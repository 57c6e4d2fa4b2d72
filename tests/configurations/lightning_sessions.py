"""One configuration of Lightning, trained with and without the callback, and what is compared."""

import dataclasses
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from curvature_callbacks import FisherSpectrum, Measurement, Record
from curvature_callbacks.lightning.callback import CurvatureCallback
from tests.lightning_runs import ListLogger, Net, lightning_trainer
from tests.training_cases import (
    Run,
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
        has_rows: whether batches tell their rows; else only what takes them whole is measured.
        fit: trains, and returns the Trainer.
        otherwise: the same training by other means, to be the same as well but for generators and what is logged.
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
    has_rows: bool = True
    fit: Callable[["Session"], pl.Trainer] = lambda session: session.fitted()
    otherwise: Callable[["Session"], pl.Trainer] | None = None
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
    if not case.has_rows:
        measurements = [one for one in measurements if not isinstance(one, FisherSpectrum)]
    with warnings.catch_warnings():
        for message in case.tolerated:
            warnings.filterwarnings("ignore", message=message)
        plain = run_of(Session(case, Path(directory) / "plain", None), case.fit)
        session = Session(case, Path(directory) / "probed", measurements)
        probed = run_of(session, case.fit)
        assert_same_training(plain, probed)
        assert_probed(session.records, case.steps, {"probe", *(one.name for one in measurements)})
        case.verified(session, probed)
        if case.otherwise is not None:
            otherwise = run_of(Session(case, Path(directory) / "otherwise", None), case.otherwise)
            assert_equal(otherwise.state, plain.state, "state")
            assert_equal(otherwise.optimizers, plain.optimizers, "optimizers")


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


def run_of(session: Session, fit: Callable[[Session], pl.Trainer]) -> Run:
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
