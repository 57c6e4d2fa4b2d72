"""A Trainer's loss is evaluated without a trace; streams are watched; what cannot be evaluated is refused."""

import copy
import gc
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from curvature_callbacks import ConfigurationError
from curvature_callbacks.transformers import loss as trainer_loss
from curvature_callbacks.transformers.callback import CurvatureCallback
from curvature_callbacks.transformers.loss import ComputeLossWatch, loss_of_trainer
from tests.configurations.transformers_cases import CASES
from tests.configurations.transformers_parts import PenalisedTrainer, collected, collecting_focal, penalties
from tests.configurations.transformers_sessions import assert_same_bits
from tests.training_cases import (
    Checksum,
    Stream,
    assert_equal,
    assert_probed,
    callback_options,
    global_generators,
    probed_steps,
    reports,
)
from tests.transformers.loss_cases import SMOOTHING, batch_of, evaluated, new_callback, trainer_for
from tests.transformers_runs import Sentences


@pytest.mark.parametrize(
    ("case", "observed"),
    [({"kind": PenalisedTrainer}, penalties), ({"arguments": collecting_focal}, collected)],
    ids=["compute_loss", "compute_loss_func"],
)
def test_an_evaluation_leaves_nothing_behind_and_gives_the_same_twice(case: Any, observed: Any, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, **case)
    trainer.train()
    attributes = dict(vars(trainer))
    before = copy.deepcopy([observed(trainer), trainer.state.log_history, vars(trainer.control), global_generators()])
    batch = batch_of(trainer)
    first, second = evaluated(trainer, batch), evaluated(trainer, batch)
    assert first.requires_grad
    assert torch.equal(first, second)
    assert sorted(batch) == ["input_ids", "labels"]
    assert_equal(before, [observed(trainer), trainer.state.log_history, vars(trainer.control), global_generators()])
    assert vars(trainer).keys() == attributes.keys()
    assert all(value is attributes[name] for name, value in vars(trainer).items())


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(PenalisedTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            super().compute_loss(*args, **kwargs)
            self.invented = 1
            raise RuntimeError("of the user's own")

    trainer = trainer_for(tmp_path, kind=Failing)
    before = copy.deepcopy(penalties(trainer))
    with pytest.raises(RuntimeError, match="of the user's own"):
        evaluated(trainer, batch_of(trainer))
    assert_equal(before, penalties(trainer))
    assert not hasattr(trainer, "invented")
    assert "log" not in vars(trainer)


@pytest.mark.parametrize("name", ["compute_loss measured", "compute_loss_func measured"])
def test_without_that_training_differs(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trainer_loss, "_trainer_without_trace", lambda trainer: nullcontext())
    with pytest.raises((AssertionError, ConfigurationError), match=r"state|logged|the loss is another"):
        assert_same_bits(CASES[name], tmp_path)


def test_two_callbacks_watch_a_stream_and_leave_the_trainer_as_it_was(tmp_path: Path, caplog: Any) -> None:
    first, second = new_callback(), new_callback(every_n_steps=1)
    trainer = trainer_for(tmp_path, [first, second], data=lambda: Stream(Sentences()), **SMOOTHING)
    trainer.train()
    assert_probed(first.history, [1, 2, 4])
    assert_probed(second.history, [1, 2, 3, 4, 5])
    assert "compute_loss" not in vars(trainer)
    assert not reports(caplog)


@pytest.mark.parametrize("order", [1, -1])
def test_the_last_watch_puts_a_compute_loss_of_the_users_back(order: int, tmp_path: Path) -> None:
    trainer, seen = trainer_for(tmp_path), []
    own = trainer.compute_loss = lambda model, inputs, **kwargs: inputs.pop("labels")  # type: ignore[method-assign]
    watches = [ComputeLossWatch(trainer, seen.append) for _ in range(2)][::order]
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model.train(), batch)
    trainer.compute_loss(trainer.model.eval(), batch_of(trainer))
    assert [sorted(one) for one in seen] == [["input_ids", "labels"]] * 2
    watches[0].remove()
    assert trainer.compute_loss is not own
    watches[1].remove()
    assert trainer.compute_loss is own


def test_evaluation_batches_of_a_stream_are_not_kept(tmp_path: Path) -> None:
    trainer, seen = trainer_for(tmp_path, **SMOOTHING), []
    ComputeLossWatch(trainer, seen.append)
    trainer.evaluate(Sentences(8))
    assert not seen


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda outputs, labels: outputs.logits.sum(), "the loss of a first probe could not be computed.*num_items_in_batch"),
        (lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(2), r"returned shape \(3, 6\)"),
        (lambda outputs, labels, num_items_in_batch=None: 1.0, "returned float instead of a tensor"),
    ],
    ids=["no such argument", "per token", "no tensor"],
)
def test_a_loss_that_cannot_be_evaluated_stops_the_run_before_step_1(function: Any, match: str, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, [new_callback()], arguments=lambda: {"compute_loss_func": function})
    with pytest.raises(ConfigurationError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_trainer_that_is_not_found_is_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("curvature_callbacks.transformers.callback.calling_trainer", lambda callback: None)
    with pytest.raises(ConfigurationError, match=r"`loss_fn`='trainer' needs the Trainer.*callback.attach"):
        trainer_for(tmp_path, [new_callback()], **SMOOTHING).train()
    own = CurvatureCallback(**callback_options())
    with pytest.raises(ConfigurationError, match=r"stream, label smoothing.*callback.attach"):
        trainer_for(tmp_path, [own], data=lambda: Stream(Sentences()), **SMOOTHING).train()


class TwoProcesses:
    size = 2


def test_an_overridden_compute_loss_is_refused_with_several_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="an overridden `compute_loss` must run in a single process, got 2"):
        loss_of_trainer(trainer_for(tmp_path, kind=PenalisedTrainer), TwoProcesses())  # type: ignore[arg-type]


def test_a_name_that_is_none_is_answered_with_those_there_are() -> None:
    from curvature_callbacks.lightning.callback import CurvatureCallback as OfLightning

    names, also = "'cross_entropy', 'mse', 'bce', got ", ".*Hugging Face also takes 'trainer'"
    with pytest.raises(ConfigurationError, match=names + "'trainers'" + also):
        CurvatureCallback(loss_fn="trainers")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=names + "'trainer'" + also):
        OfLightning(loss_fn="trainer")  # type: ignore[arg-type]


def test_nothing_is_warned_about_where_the_trained_loss_is_measured(tmp_path: Path, caplog: Any) -> None:
    trainer_for(tmp_path, [new_callback(measure=[Checksum()])], max_steps=1, **SMOOTHING).train()
    assert not reports(caplog)


def test_a_trainer_is_freed_without_the_garbage_collector_as_without_the_callback(tmp_path: Path) -> None:
    """One in a cycle goes with the next collection, and its persistent workers then take five seconds to end."""
    probing = new_callback(measure=[Checksum()])
    trainer = trainer_for(tmp_path, [probing])
    trainer.train()
    found = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert found() is None
    finally:
        gc.enable()
    assert probed_steps(probing.history) == [0, 2, 4]
