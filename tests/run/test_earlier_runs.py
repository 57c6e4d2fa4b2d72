"""What an earlier release wrote is read, and measured on from: start vectors, averages, self-checks that were passed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from curvature_callbacks import GradientNoise, Record
from curvature_callbacks.lightning import CurvatureCallback as LightningCallback
from curvature_callbacks.transformers import CurvatureCallback as TransformersCallback
from tests.lightning_runs import LIGHTNING_WARNINGS
from tests.run import earlier_runs
from tests.run.earlier_runs import CHECKPOINT, NUM_STEPS, SAVED_AT, callback_arguments
from tests.run.later_releases import record_field, with_default, with_field
from tests.training_cases import reports

FILES = Path(__file__).parents[1] / "data" / "earlier_runs"

pytestmark = LIGHTNING_WARNINGS


def earlier_records(name: str) -> list[Record]:
    return [Record.from_json(line) for line in (FILES / name).read_text().splitlines()]


def assert_measured_on(records: Sequence[Record], earlier: Sequence[Record]) -> None:
    """The same numbers, by as many products, as the run measured that was not interrupted."""
    found, expected = (
        {(r.step, r.measurement, r.block): r for r in each if r.measurement != "probe" and r.step >= SAVED_AT}
        for each in (records, earlier)
    )
    assert found.keys() == expected.keys()
    assert len(found) > 0
    for key, record in expected.items():
        assert found[key].error is None
        assert found[key].num_matvecs == record.num_matvecs, key
        assert dict(found[key].scalars) == pytest.approx(dict(record.scalars), rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("name", ["plain.jsonl", "lightning.jsonl", "transformers.jsonl"])
def test_records_are_read(name: str) -> None:
    records = earlier_records(name)
    assert {record.step for record in records} == {0, 3, 6, 9}
    assert len({record.measurement for record in records}) == 8
    assert [Record.from_json(record.to_json()).to_json() for record in records] == [record.to_json() for record in records]


def plain_run_from(state: Any) -> list[Record]:
    """What a monitor with this state measures from the saved parameters on."""
    saved = torch.load(FILES / "plain.pt", weights_only=True)
    model, optimizer = earlier_runs.plain_parts()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    monitor = earlier_runs.plain_monitor(model, optimizer)
    if state is not None:
        monitor.load_state_dict(state)
    earlier_runs.plain_training(model, optimizer, monitor, first=SAVED_AT, last=NUM_STEPS)
    return monitor.history


def of(records: Sequence[Record], measurement: str) -> list[Record]:
    return [record for record in records if record.measurement == measurement]


def test_a_monitor_goes_on() -> None:
    state = torch.load(FILES / "plain.pt", weights_only=True)["monitor"]
    assert_measured_on(plain_run_from(state), earlier_records("plain.jsonl"))


def test_averages_go_on_from_json_alone() -> None:
    records = plain_run_from(json.loads((FILES / "plain.json").read_text()))
    assert_measured_on(of(records, "gradient_noise"), of(earlier_records("plain.jsonl"), "gradient_noise"))


def test_a_run_that_begins_anew_is_told_apart() -> None:
    """The same probes without the saved state: other averages, more products."""
    anew, expected = plain_run_from(None), earlier_records("plain.jsonl")
    for measurement in ("gradient_noise", "hessian", "ggn", "edge"):
        with pytest.raises(AssertionError):
            assert_measured_on(of(anew, measurement), of(expected, measurement))
    assert_measured_on(of(anew, "empirical_fisher"), of(expected, "empirical_fisher"))  # which carries nothing


def test_a_lightning_checkpoint_goes_on(tmp_path: Path, caplog: Any) -> None:
    callback = LightningCallback(**callback_arguments(loss_fn="cross_entropy"))
    earlier_runs.lightning_training(tmp_path, callback, checkpoint=FILES / "lightning.ckpt")
    assert_measured_on(callback.history, earlier_records("lightning.jsonl"))
    assert reports(caplog) == []


def test_a_checkpoint_of_the_trainer_goes_on(tmp_path: Path, caplog: Any) -> None:
    shutil.copytree(FILES / CHECKPOINT, tmp_path / CHECKPOINT)
    callback = TransformersCallback(**callback_arguments())
    earlier_runs.transformers_training(tmp_path, callback, checkpoint=tmp_path / CHECKPOINT)
    later = [record for record in earlier_records("transformers.jsonl") if record.step > SAVED_AT]  # it probes, then saves
    assert_measured_on(callback.history, later)
    assert reports(caplog) == []


def replaced(cls: type, measurement: Any) -> list[Any]:
    return [measurement if type(each) is cls else each for each in earlier_runs.measurements()]


def test_a_field_that_was_added_since_changes_nothing(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    record_field(monkeypatch, GradientNoise, default=3)
    measure = replaced(GradientNoise, with_field(GradientNoise, default=3)())
    callback = LightningCallback(**callback_arguments(loss_fn="cross_entropy", measure=measure))
    earlier_runs.lightning_training(tmp_path, callback, checkpoint=FILES / "lightning.ckpt")
    assert_measured_on(callback.history, earlier_records("lightning.jsonl"))
    assert reports(caplog) == []


def test_a_default_that_changed_since_is_said_and_begins_anew(tmp_path: Path, caplog: Any) -> None:
    shutil.copytree(FILES / CHECKPOINT, tmp_path / CHECKPOINT)
    callback = TransformersCallback(
        **callback_arguments(measure=replaced(GradientNoise, with_default(GradientNoise, decay=0.8)()))
    )
    earlier_runs.transformers_training(tmp_path, callback, checkpoint=tmp_path / CHECKPOINT)
    (report,) = reports(caplog)
    assert "had other arguments (`measure` [" in report
    assert "GradientNoise(decay=0.9)" in report.partition(", now ")[0]
    assert "GradientNoise(decay=0.8)" in report.partition(", now ")[2]
    assert {record.step for record in callback.history} == {SAVED_AT, 9}


@pytest.mark.parametrize("name", earlier_runs.KEYED)
def test_the_keys_of_both_callbacks_stay(name: str) -> None:
    assert earlier_runs.keys()[name] == json.loads((FILES / "keys.json").read_text())[name]
