"""What is refused before training, and what fails inside a probe of the Trainer's run and leaves training as it was."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from curvature_callbacks import ConfigurationError, FisherSpectrum
from tests.training_cases import Checksum, Raising, Stream, assert_probed, assert_same_training, num_hooks, reports
from tests.transformers.callback_cases import new_callback, trainer_for
from tests.transformers_runs import Sentences, language_model, transformers_run


class AllIgnored(Sentences):
    def __init__(self) -> None:
        super().__init__()
        self.labels[:] = -100


@pytest.mark.parametrize(
    ("changes", "arguments", "match"),
    [
        ({"data": lambda: Sentences(labels=False)}, {}, "the model returns no `.loss`.*input_ids.*Add `labels`"),
        ({"data": AllIgnored}, {}, "every label of the drawn microbatches is ignored.*collator"),
        ({"model": lambda: language_model().requires_grad_(False)}, {}, "no trainable parameter"),
        ({}, {"params_filter": lambda name, parameter: False}, "`params_filter`"),
        ({}, {"loss_fn": lambda model, batch: None}, "returned NoneType instead of a tensor"),
    ],
    ids=["no labels", "all ignored", "frozen", "nothing left", "bad loss_fn"],
)
def test_what_cannot_be_measured_is_refused_before_training(
    changes: dict[str, Any], arguments: dict[str, Any], match: str, tmp_path: Path
) -> None:
    model = changes.get("model", language_model)()
    data = changes.get("data", Sentences)()
    rest = {key: value for key, value in changes.items() if key not in ("model", "data")}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_for(tmp_path, [new_callback(**arguments)], model=model, data=data, **rest)
    with pytest.raises(ConfigurationError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1, got 0"),
        ({"draw": "sometimes"}, "`draw` must be one of 'fresh', 'fixed', got 'sometimes'"),
        ({"block_structure": "layers"}, "`block_structure` must be one of"),
        ({"measure": [FisherSpectrum]}, "`measure` must hold measurements"),
    ],
)
def test_a_bad_argument_is_refused_at_construction(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        new_callback(**changes)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("kernel"),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), marks=pytest.mark.slow),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_in_a_measurement_changes_nothing(error: Exception, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "curvature_callbacks")
    case = {"max_steps": 8, "auto_find_batch_size": True}
    plain = transformers_run(tmp_path, **case)
    probed = transformers_run(tmp_path, new_callback(measure=[Raising(error=error), Checksum()]), **case)
    assert_same_training(plain, probed)
    failed = [record for record in probed.records if record.measurement == "raising"]
    assert [(record.step, record.error) for record in failed] == [(s, f"{type(error).__name__}: {error}") for s in (0, 2, 4)]
    assert_probed([record for record in probed.records if not record.failed], range(0, 9, 2), {"checksum"})
    said = reports(caplog)
    assert len(said) == 1 + isinstance(error, torch.OutOfMemoryError)  # that smaller microbatches are tried
    assert all(str(error) in text for text in said)


def test_a_keyboard_interrupt_stops_training_and_restores_the_model(tmp_path: Path) -> None:
    model, probing = language_model(), new_callback(measure=[Raising(error=KeyboardInterrupt(), at=(2,))])
    model.transformer.h[0].eval()
    flags = [module.training for module in model.transformer.h[0].modules()]
    trainer = trainer_for(tmp_path, [probing], model=model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not any(flags)
    assert all(module.training for module in model.modules())  # as the Trainer had set them


class Boom(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("of the user's own")


def test_a_run_that_crashes_leaves_no_hook_for_the_next(tmp_path: Path) -> None:
    """The Trainer tells callbacks nothing about a crash, so the hook goes at the next run at the latest."""
    model, probing = language_model(), new_callback(measure=[Checksum()])
    with pytest.raises(RuntimeError, match="of the user's own"):
        trainer_for(tmp_path, [probing, Boom()], model=model, data=Stream(Sentences())).train()
    trainer_for(tmp_path, [probing], model=model).train()
    assert num_hooks(model) == 0


class Strict(TrainerCallback):
    """A user's callback that expects a loss in every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        _ = logs["loss"] if "train_runtime" not in logs else None


def test_a_reporter_that_raises_on_our_row_does_not_stop_training(tmp_path: Path, caplog: Any) -> None:
    probing = new_callback(every_n_steps=2, measure=[Checksum()])
    trainer = trainer_for(tmp_path, [probing, Strict()], max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert len([record for record in caplog.records if "KeyError" in record.getMessage()]) == 1
