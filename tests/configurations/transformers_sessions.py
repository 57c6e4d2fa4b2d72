"""One configuration of the Trainer, trained with and without the callback, and what is compared."""

import dataclasses
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from curvature_callbacks import Measurement
from curvature_callbacks.transformers.callback import CurvatureCallback
from tests.training_cases import (
    Run,
    assert_probed,
    assert_same_training,
    callback_options,
    cheap,
    global_generators,
    seed_everything,
)
from tests.transformers_runs import Sentences, language_model, training_arguments, training_rows


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        title: for a table of documentation.
        changes: of `TrainingArguments`.
        model, data, collator: make a fresh one each.
        trainer: the class.
        arguments: more keyword arguments of the Trainer, made afresh.
        callback: options of the callback.
        steps: at which a probe must have succeeded.
        has_likelihood: whether the loss measured has one, so that `wide()` can be measured too.
        times: how often `train()` is called.
        interrupted: the step after which training stops and goes on from its checkpoint in a new Trainer.
        observed: what else a user could see change, of a Trainer after training.
        tolerated: beginning of a warning that this configuration gives without a callback too.
        is_slow: whether it takes seconds rather than tenths of one.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = language_model
    data: Callable[[], Any] = Sentences
    collator: Callable[[], Any] | None = None
    trainer: type[Trainer] = Trainer
    arguments: Callable[[], dict[str, Any]] = dict
    callback: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[int] = (0, 2, 4)
    has_likelihood: bool = True
    times: int = 1
    interrupted: int | None = None
    observed: Callable[[Trainer], Any] = lambda trainer: None
    tolerated: str | None = None
    is_slow: bool = False


def assert_same_bits(case: Case, directory: Any, measure: Sequence[Measurement] | None = None) -> None:
    """Train with and without the callback; raise an `AssertionError` where anything differs or was not measured."""
    measurements = cheap() if measure is None else list(measure)
    with warnings.catch_warnings():
        if case.tolerated:
            warnings.filterwarnings("ignore", message=case.tolerated)
        plain = run_of(case, Path(directory) / "plain")
        probing = CurvatureCallback(**callback_options(measure=measurements, **case.callback))
        probed = run_of(case, Path(directory) / "probed", probing)
        assert_same_training(plain, probed)
        assert_probed(probing.history, case.steps, {"probe", *(one.name for one in measurements)})
        if case.interrupted is not None:
            uninterrupted = run_of(dataclasses.replace(case, interrupted=None), Path(directory) / "uninterrupted")
            uninterrupted.logged, plain.logged = without_summary(uninterrupted.logged), without_summary(plain.logged)
            assert_same_training(uninterrupted, plain)


def run_of(case: Case, directory: Path, callback: CurvatureCallback | None = None) -> Run:
    """Train as `case` says and take down everything that must not depend on the callback."""
    seed_everything()
    callbacks: list[TrainerCallback] = [callback] if callback else []
    resumed = None
    if case.interrupted is not None:
        first = trainer_of(case, directory, [*callbacks, StopAfter(case.interrupted)], save_steps=case.interrupted)
        first.train()
        resumed = str(directory / f"checkpoint-{case.interrupted}")
        seed_everything(2)  # what the generators hold now must come from the checkpoint
    trainer = trainer_of(case, directory, callbacks)
    for _ in range(case.times):
        trainer.train(resume_from_checkpoint=resumed)
    assert trainer.optimizer is not None
    assert trainer.model is not None
    scaler = trainer.accelerator.scaler
    return Run(
        state=dict(trainer.model.state_dict()) | {"training": [child.training for child in trainer.model.modules()]},
        optimizers=[trainer.optimizer.state_dict(), scaler and scaler.state_dict()],
        logged=[training_rows(trainer.state.log_history), case.observed(trainer)],
        generators=[*global_generators(), *own_generators(trainer)],
        records=list(callback.history) if callback else [],
    )


def trainer_of(case: Case, directory: Path, callbacks: list[TrainerCallback], **changes: Any) -> Trainer:
    saving = {"save_strategy": "steps"} if changes else {}
    return case.trainer(
        model=case.model(),
        args=training_arguments(directory, **(dict(case.changes) | saving | changes)),
        train_dataset=case.data(),
        data_collator=case.collator() if case.collator else None,
        callbacks=callbacks,
        **case.arguments(),
    )


def own_generators(trainer: Trainer) -> list[Any]:
    """States of the generators that collator, data set or Trainer hold."""
    held = [value for owner in (trainer.data_collator, trainer.train_dataset, trainer) for value in vars_of(owner)]
    torches = [value.get_state() for value in held if isinstance(value, torch.Generator)]
    numpys = [value.bit_generator.state for value in held if isinstance(value, np.random.Generator)]
    return [*torches, *numpys, *(value.getstate() for value in held if isinstance(value, random.Random))]


def vars_of(owner: Any) -> list[Any]:
    return list(getattr(owner, "__dict__", {}).values())


def without_summary(logged: list[Any]) -> list[Any]:
    """The row at the end averages over the steps since training was started or resumed; a checkpoint sorts the keys."""
    rows, observed = logged
    return [[dict(sorted(row.items())) for row in rows if "train_loss" not in row], observed]


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


CLOCK = ("runtime", "per_second")
