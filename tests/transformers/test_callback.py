"""The callback for the Hugging Face Trainer in a run: steps, logging, reporters. See also `tests.configurations`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from transformers import Trainer

from curvature_callbacks import read_records
from curvature_callbacks.isolation import model as isolation
from tests.training_cases import (
    ROWS,
    Checksum,
    Contents,
    Stream,
    assert_probed,
    assert_same_training,
    num_hooks,
    probed_steps,
    reports,
)
from tests.transformers.callback_cases import SHARPNESS, new_callback, trainer_for
from tests.transformers_runs import Log, Sentences, language_model, training_arguments, transformers_run


def test_a_measurement_that_draws_from_global_generators_is_harmless(tmp_path: Path) -> None:
    plain, probed = transformers_run(tmp_path), transformers_run(tmp_path, new_callback(measure=[Checksum()]))
    assert_probed(probed.records, [0, 2, 4], {"checksum"})
    assert_same_training(plain, probed)


def test_without_restored_generators_training_differs(tmp_path: Path, monkeypatch: Any) -> None:
    from contextlib import nullcontext

    plain = transformers_run(tmp_path)
    monkeypatch.setattr(isolation, "_generators", lambda device, seed: nullcontext())
    probed = transformers_run(tmp_path, new_callback(measure=[Checksum()]))
    with pytest.raises(AssertionError, match=r"state|logged"):
        assert_same_training(plain, probed)


def test_step_s_means_after_s_updates(tmp_path: Path) -> None:
    """Accumulation and all: the parameters a probe saw are those a run without it has after as many steps."""
    torch.manual_seed(0)
    log = Log()
    trainer_for(tmp_path, [log], gradient_accumulation_steps=2).train()
    torch.manual_seed(0)
    probing = new_callback(measure=[Checksum()])
    trainer_for(tmp_path, [probing], gradient_accumulation_steps=2).train()
    seen = {record.step: record.scalars["value"] for record in probing.history if record.measurement == "checksum"}
    assert list(seen) == [0, 2, 4]
    assert len(set(log.checksums.values())) == 6
    assert seen == {step: log.checksums[step] for step in seen}


def test_headline_values_reach_log_history_and_every_reporter(tmp_path: Path) -> None:
    log, probing = Log(), new_callback()
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
    trainer = trainer_for(tmp_path, [new_callback()], logging_steps=logging_steps, max_steps=6)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == list(range(logging_steps, 7, logging_steps))


def test_tensorboard_has_the_tags_under_their_own_names_in_one_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    probing = new_callback()
    trainer = trainer_for(tmp_path, [probing], report_to="tensorboard")
    assert probing.attach(trainer) is probing  # that it is found without: below
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
    probing = new_callback()
    trainer_for(tmp_path, [probing], disable_tqdm=False, report_to="none").train()
    assert_probed(probing.history, [0, 2, 4])
    assert SHARPNESS in "".join(capsys.readouterr())


def test_json_lines_in_the_output_directory_hold_everything(tmp_path: Path) -> None:
    probing = new_callback()
    trainer_for(tmp_path, [probing]).train()
    read = read_records(tmp_path / "curvature.jsonl")
    assert [record.to_json() for record in read] == [record.to_json() for record in probing.history]
    spectra = [record.arrays["eigenvalues"] for record in read if record.measurement == "empirical_fisher" and record.block]
    assert {len(spectrum) for spectrum in spectra} == {6}  # N = 2 microbatches of 3 rows


@pytest.mark.parametrize("when", ["constructor", "added"])
def test_the_trainer_is_found_without_being_attached(when: str, tmp_path: Path, caplog: Any) -> None:
    probing = new_callback(measure=[Checksum()])
    trainer = trainer_for(tmp_path, [probing] if when == "constructor" else [])
    if when == "added":
        trainer.add_callback(probing)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "curvature/probe_seconds" in row] == [0, 2, 4]
    assert not reports(caplog)


def test_training_twice_measures_twice(tmp_path: Path) -> None:
    probing = new_callback(measure=[Checksum()])
    trainer = trainer_for(tmp_path, [probing])
    trainer.train()
    trainer.train()
    assert probed_steps(probing.history) == [0, 2, 4, 0, 2, 4]


def test_a_second_trainer_gets_its_own_log(tmp_path: Path) -> None:
    probing = new_callback(measure=[Checksum()])
    trainers = [trainer_for(tmp_path, [probing]) for _ in range(2)]
    for trainer in trainers:
        trainer.train()
        assert [row["step"] for row in trainer.state.log_history if "curvature/probe_seconds" in row] == [0, 2, 4]


def test_two_callbacks_with_different_intervals_in_one_trainer(tmp_path: Path) -> None:
    often, rarely = new_callback(measure=[Checksum()]), new_callback(every_n_steps=3)
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
    trainer = OverridingTrainer(**arguments, callbacks=[new_callback(measure=[Checksum()])])
    trainer.train()
    assert trainer.flushed == 5 + 1  # each step and the summary at the end
    assert [row["step"] for row in trainer.state.log_history if "curvature/probe_seconds" in row] == [0, 2, 4]


@pytest.mark.parametrize("data", [Sentences, lambda: Stream(Sentences())], ids=["map", "stream"])
def test_no_hook_is_left_on_the_model(data: Callable[[], Dataset[Any]], tmp_path: Path) -> None:
    model = language_model()
    trainer_for(tmp_path, [new_callback()], model=model, data=data()).train()
    assert num_hooks(model) == 0


def test_only_training_batches_of_a_stream_are_kept(tmp_path: Path) -> None:
    """Those of an evaluation between the steps, which larger tokens tell apart, and those of the probe itself are not."""
    evaluated, trained = Sentences(), Sentences()
    trained.tokens = trained.tokens % 8
    evaluated.tokens = evaluated.tokens % 8 + 8
    probing = new_callback(every_n_steps=1, measure=[Contents()])
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


def test_rows_are_drawn_from_all_of_the_dataset(tmp_path: Path) -> None:
    class Watching(Sentences):
        asked: set[int] = set()  # noqa: RUF012

        def __getitem__(self, index: int) -> Any:
            self.asked.add(index)
            return super().__getitem__(index)

    data = Watching()
    probing = new_callback(every_n_steps=1, measure=[Checksum()], num_microbatches=4, microbatch_size=8)
    trainer_for(tmp_path, [probing], data=data, max_steps=1).train()
    assert data.asked == set(range(ROWS))
    assert {record.scalars["rows"] for record in probing.history if record.measurement == "probe"} == {float(ROWS)}
