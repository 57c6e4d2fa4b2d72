"""The callback for the Hugging Face Trainer: training unchanged bit for bit, logs intact, and errors before step 1."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from curvature_callbacks import ConfigurationError, FisherSpectrum, RefusedError, read_records
from curvature_callbacks.isolation import model as isolation
from curvature_callbacks.transformers.callback import CurvatureCallback
from tests.training_cases import (
    ROWS,
    Checksum,
    Contents,
    Raising,
    Stream,
    assert_probed,
    assert_same_training,
    callback_options,
    num_hooks,
    probed_steps,
    reports,
)
from tests.transformers_runs import Log, Sentences, language_model, training_arguments, transformers_run

SHARPNESS = "curvature/hessian_lambda_max"


def callback(**changes: Any) -> CurvatureCallback:
    return CurvatureCallback(**callback_options(**changes))


def trainer_for(directory: Any, callbacks: list[Any], **changes: Any) -> Trainer:
    """A Trainer on the usual case; `model` and `data` may be given."""
    model, data = changes.pop("model", None), changes.pop("data", None)
    return Trainer(
        model=language_model() if model is None else model,
        args=training_arguments(directory, **changes),
        train_dataset=Sentences() if data is None else data,
        callbacks=callbacks,
    )


# ------------------------------------------------------------------------------------------------------------ invariance


def test_a_measurement_that_draws_from_global_generators_is_harmless(tmp_path: Path) -> None:
    plain, probed = transformers_run(tmp_path), transformers_run(tmp_path, callback(measure=[Checksum()]))
    assert_probed(probed.records, [0, 2, 4], {"checksum"})
    assert_same_training(plain, probed)


def test_without_restored_generators_training_differs(tmp_path: Path, monkeypatch: Any) -> None:
    from contextlib import nullcontext

    plain = transformers_run(tmp_path)
    monkeypatch.setattr(isolation, "_generators", lambda device, seed: nullcontext())
    probed = transformers_run(tmp_path, callback(measure=[Checksum()]))
    with pytest.raises(AssertionError, match=r"state|logged"):
        assert_same_training(plain, probed)


# ------------------------------------------------------------------------------------------------------ steps and logging


def test_step_s_means_after_s_updates(tmp_path: Path) -> None:
    """Accumulation and all: the parameters a probe saw are those a run without it has after as many steps."""
    torch.manual_seed(0)
    log = Log()
    trainer_for(tmp_path, [log], gradient_accumulation_steps=2).train()
    torch.manual_seed(0)
    probing = callback(measure=[Checksum()])
    trainer_for(tmp_path, [probing], gradient_accumulation_steps=2).train()
    seen = {record.step: record.scalars["value"] for record in probing.history if record.measurement == "checksum"}
    assert list(seen) == [0, 2, 4]
    assert len(set(log.checksums.values())) == 6
    assert seen == {step: log.checksums[step] for step in seen}


def test_headline_values_reach_log_history_and_every_reporter(tmp_path: Path) -> None:
    log, probing = Log(), callback()
    trainer = trainer_for(tmp_path, [log, probing])
    trainer.train()
    rows = {row["step"]: row for row in trainer.state.log_history if SHARPNESS in row}
    assert list(rows) == [0, 2, 4]
    hessians = {record.step: record.scalars["lambda_max"] for record in probing.history if record.measurement == "hessian"}
    assert {step: row[SHARPNESS] for step, row in rows.items()} == hessians
    assert all(type(value) in (float, int) for row in rows.values() for value in row.values())
    assert [step for step, row in log.rows if SHARPNESS in row] == [0, 2, 4]
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_the_loss_log_of_a_coinciding_step_is_kept(logging_steps: int, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, [callback()], logging_steps=logging_steps, max_steps=6)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == list(range(logging_steps, 7, logging_steps))


@pytest.mark.parametrize("attached", [False, True], ids=["found", "attached"])
def test_tensorboard_has_the_tags_under_their_own_names_in_one_file(attached: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    probing = callback()
    trainer = trainer_for(tmp_path, [probing], report_to="tensorboard")
    if attached:
        assert probing.attach(trainer) is probing
    trainer.train()
    assert len(list((tmp_path / "events").rglob("events.out.*"))) == 1
    accumulator = EventAccumulator(str(tmp_path / "events"))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert [event.step for event in accumulator.Scalars(SHARPNESS)] == [0, 2, 4]
    assert [event.step for event in accumulator.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert not [tag for tag in tags["scalars"] if tag.startswith("train/curvature")]
    assert "curvature_empirical_fisher_condition_number/heat_map" in tags["images"]
    assert "curvature/worst_blocks/text_summary" in tags["tensors"]


def test_no_reporter_and_a_progress_bar(tmp_path: Path, capsys: Any) -> None:
    probing = callback()
    trainer_for(tmp_path, [probing], disable_tqdm=False, report_to="none").train()
    assert_probed(probing.history, [0, 2, 4])
    assert SHARPNESS in "".join(capsys.readouterr())


def test_json_lines_in_the_output_directory_hold_everything(tmp_path: Path) -> None:
    probing = callback()
    trainer_for(tmp_path, [probing]).train()
    read = read_records(tmp_path / "curvature.jsonl")
    assert [record.to_json() for record in read] == [record.to_json() for record in probing.history]
    spectra = [record.arrays["eigenvalues"] for record in read if record.measurement == "empirical_fisher" and record.block]
    assert {len(spectrum) for spectrum in spectra} == {6}  # N = 2 microbatches of 3 rows


@pytest.mark.parametrize("when", ["constructor", "added"])
def test_the_trainer_is_found_without_being_attached(when: str, tmp_path: Path, caplog: Any) -> None:
    probing = callback(measure=[Checksum()])
    trainer = trainer_for(tmp_path, [probing] if when == "constructor" else [])
    if when == "added":
        trainer.add_callback(probing)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "curvature/probe_seconds" in row] == [0, 2, 4]
    assert not reports(caplog)


def test_training_twice_measures_twice(tmp_path: Path) -> None:
    probing = callback(measure=[Checksum()])
    trainer = trainer_for(tmp_path, [probing])
    trainer.train()
    trainer.train()
    assert probed_steps(probing.history) == [0, 2, 4, 0, 2, 4]


def test_a_second_trainer_gets_its_own_log(tmp_path: Path) -> None:
    probing = callback(measure=[Checksum()])
    trainers = [trainer_for(tmp_path, [probing]) for _ in range(2)]
    for trainer in trainers:
        trainer.train()
        assert [row["step"] for row in trainer.state.log_history if "curvature/probe_seconds" in row] == [0, 2, 4]


def test_two_callbacks_with_different_intervals_in_one_trainer(tmp_path: Path) -> None:
    often, rarely = callback(measure=[Checksum()]), callback(every_n_steps=3)
    trainer_for(tmp_path, [often, rarely]).train()
    assert probed_steps(often.history) == [0, 2, 4]
    assert probed_steps(rarely.history) == [0, 3]


class OverridingTrainer(Trainer):
    """Flushes what it has gathered whenever it logs, as TRL's trainers do."""

    flushed = 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.flushed += 1
        super().log(logs, *args, **kwargs)


def test_an_overridden_log_is_not_called_for_curvature(tmp_path: Path) -> None:
    arguments = {"model": language_model(), "args": training_arguments(tmp_path), "train_dataset": Sentences()}
    trainer = OverridingTrainer(**arguments, callbacks=[callback(measure=[Checksum()])])
    trainer.train()
    assert trainer.flushed == 5 + 1  # each step and the summary at the end
    assert [row["step"] for row in trainer.state.log_history if "curvature/probe_seconds" in row] == [0, 2, 4]


# -------------------------------------------------------------------------------------------------------------- resume


def test_resuming_goes_on_where_the_schedule_was(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    first, second = (callback(every_n_steps=3, measure=[Checksum()]) for _ in range(2))
    trainer_for(tmp_path, [first], **saving).train()
    trainer_for(tmp_path, [second], max_steps=7).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert probed_steps(first.history) == [0, 3]
    assert probed_steps(second.history) == [6]


def test_resuming_a_checkpoint_without_the_callback_measures_at_once_and_can_save(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, [], **saving, max_steps=4).train()
    probing = callback(every_n_steps=3, measure=[Checksum()])
    trainer_for(tmp_path, [probing], **saving, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert probed_steps(probing.history) == [4, 6]
    assert (tmp_path / "checkpoint-6").exists()


def test_a_checkpoint_with_the_callback_loads_without_it(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, [callback(measure=[Checksum()])], **saving, max_steps=2).train()
    trainer = trainer_for(tmp_path, [], **saving, max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_a_switched_off_measurement_stays_off_after_resuming(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first, second = (callback(measure=[Raising(error=RefusedError("never"))]) for _ in range(2))
    trainer_for(tmp_path, [first], **saving).train()
    trainer_for(tmp_path, [second], max_steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [record.measurement for record in first.history].count("raising") == 1
    assert [record.measurement for record in second.history].count("raising") == 0


# -------------------------------------------------------------------------------------------------------- misconfiguration


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
    trainer = trainer_for(tmp_path, [callback(**arguments)], model=model, data=data, **rest)
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
        callback(**changes)


def test_a_loss_other_than_the_models_own_is_pointed_out(tmp_path: Path, caplog: Any) -> None:
    trainer_for(tmp_path, [callback(measure=[Checksum()])], label_smoothing_factor=0.1, max_steps=1).train()
    assert [report for report in reports(caplog) if "`label_smoothing_factor`" in report and "`loss_fn`" in report]
    assert len(reports(caplog)) == 1


# ------------------------------------------------------------------------------------------------ failures inside a probe


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
    probed = transformers_run(tmp_path, callback(measure=[Raising(error=error), Checksum()]), **case)
    assert_same_training(plain, probed)
    failed = [record for record in probed.records if record.measurement == "raising"]
    assert [(record.step, record.error) for record in failed] == [(s, f"{type(error).__name__}: {error}") for s in (0, 2, 4)]
    assert_probed([record for record in probed.records if not record.failed], range(0, 9, 2), {"checksum"})
    said = reports(caplog)
    assert len(said) == 1 + isinstance(error, torch.OutOfMemoryError)  # that smaller microbatches are tried
    assert all(str(error) in text for text in said)


def test_a_keyboard_interrupt_stops_training_and_restores_the_model(tmp_path: Path) -> None:
    model, probing = language_model(), callback(measure=[Raising(error=KeyboardInterrupt(), at=(2,))])
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
    model, probing = language_model(), callback(measure=[Checksum()])
    with pytest.raises(RuntimeError, match="of the user's own"):
        trainer_for(tmp_path, [probing, Boom()], model=model, data=Stream(Sentences())).train()
    trainer_for(tmp_path, [probing], model=model).train()
    assert num_hooks(model) == 0


@pytest.mark.parametrize("data", [Sentences, lambda: Stream(Sentences())], ids=["map", "stream"])
def test_no_hook_is_left_on_the_model(data: Callable[[], Dataset[Any]], tmp_path: Path) -> None:
    model = language_model()
    trainer_for(tmp_path, [callback()], model=model, data=data()).train()
    assert num_hooks(model) == 0


def test_only_training_batches_of_a_stream_are_kept(tmp_path: Path) -> None:
    """Those of an evaluation between the steps, which larger tokens tell apart, and those of the probe itself are not."""
    evaluated, trained = Sentences(), Sentences()
    trained.tokens = trained.tokens % 8
    evaluated.tokens = evaluated.tokens % 8 + 8
    probing = callback(every_n_steps=1, measure=[Contents()])
    trainer = Trainer(
        model=language_model(),
        args=training_arguments(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=Stream(trained),
        eval_dataset=evaluated,
        callbacks=[probing],
    )
    trainer.train()
    found = [record.metadata for record in probing.history if record.measurement == "contents"]
    assert len(found) == 5
    assert all(one == {"keys": ["input_ids", "labels"], "largest": one["largest"]} for one in found)
    assert max(one["largest"] for one in found) < 8


def test_a_switched_off_measurement_stays_off_when_two_callbacks_resume(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first, second = (callback(measure=[Raising(error=RefusedError("never"))]) for _ in range(2))
    trainer_for(tmp_path, [first, callback(measure=[Checksum()])], **saving).train()
    again = trainer_for(tmp_path, [second, callback(measure=[Checksum()])], max_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [record.measurement for record in first.history].count("raising") == 1
    assert [record.measurement for record in second.history].count("raising") == 0


def test_rows_are_drawn_from_all_of_the_dataset(tmp_path: Path) -> None:
    class Watching(Sentences):
        asked: set[int] = set()  # noqa: RUF012

        def __getitem__(self, index: int) -> Any:
            self.asked.add(index)
            return super().__getitem__(index)

    data = Watching()
    probing = callback(every_n_steps=1, measure=[Checksum()], num_microbatches=4, microbatch_size=8)
    trainer_for(tmp_path, [probing], data=data, max_steps=1).train()
    assert data.asked == set(range(ROWS))
    assert {record.scalars["rows"] for record in probing.history if record.measurement == "probe"} == {float(ROWS)}


class Strict(TrainerCallback):
    """A user's callback that expects a loss in every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        _ = logs["loss"] if "train_runtime" not in logs else None


def test_a_reporter_that_raises_on_our_row_does_not_stop_training(tmp_path: Path, caplog: Any) -> None:
    probing = callback(every_n_steps=2, measure=[Checksum()])
    trainer = trainer_for(tmp_path, [probing, Strict()], max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert len([record for record in caplog.records if "KeyError" in record.getMessage()]) == 1
