"""What a Lightning run logs: TensorBoard, CSV, other loggers, the progress bar, JSON lines."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.nn import functional as F

from curvature_callbacks import read_records
from tests.configurations.lightning_nets import ValidatedNet
from tests.lightning.callback_cases import events, new_callback, points
from tests.lightning_runs import LIGHTNING_WARNINGS, ListLogger, Net, lightning_run, lightning_trainer
from tests.training_cases import Checksum, assert_probed, assert_same_training, loader, probed_steps, reports, seed_everything

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture(autouse=True)
def _same_networks() -> None:
    """Of another network a row may be without a gradient, or no eigenvalue negative."""
    seed_everything()


def test_tensorboard_gets_curves_histograms_and_pictures_in_one_file(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    lightning_trainer(tmp_path, [new_callback()], logger=logger).fit(Net(), loader())
    written = events(logger.log_dir)
    tags = written.Tags()
    assert list(points(written, "curvature/hessian_lambda_max")) == [0, 2, 4, 6]
    assert list(points(written, "curvature_empirical_fisher_condition_number/00")) == [0, 2, 4, 6]
    assert points(written, "curvature/failed") == dict.fromkeys([0, 2, 4, 6], 0.0)
    assert "curvature_empirical_fisher_lambda_max/heat_map" in tags["images"]
    assert "curvature/worst_blocks/text_summary" in tags["tensors"]
    assert {"train_loss_step", "checksum"} <= set(tags["scalars"])
    assert len(list(Path(logger.log_dir).glob("events.out.*"))) == 1


def test_csv_logger_gets_the_scalars_beside_the_loss(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    lightning_trainer(tmp_path, [new_callback()], logger=logger).fit(Net(), loader())
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    assert [int(row["step"]) for row in rows if row["curvature/hessian_lambda_max"]] == [0, 2, 4, 6]
    assert [int(row["step"]) for row in rows if row["train_loss_step"]] == list(range(7))


def test_every_logger_is_served(tmp_path: Path) -> None:
    first, second = ListLogger(), ListLogger()
    lightning_trainer(tmp_path, [new_callback()], logger=[first, second]).fit(Net(), loader())
    assert first.rows == second.rows
    assert [step for step, row in first.rows if "curvature/probe_seconds" in row] == [0, 2, 4, 6]


def test_all_probes_log_the_same_tags(tmp_path: Path) -> None:
    logger = ListLogger()
    lightning_trainer(tmp_path, [new_callback()], logger=logger).fit(Net(), loader())
    keys = [frozenset(row) for _, row in logger.rows if "curvature/probe_seconds" in row]
    # Absent until one has converged, and before the first step.
    of_negative = ("most_negative_eigenvalue", "ritz_negative_fraction", "ritz_negative_mass")
    optional = {"curvature_probe/training_loss", *(f"curvature/hessian_{name}" for name in of_negative)}
    assert len({key - optional for key in keys}) == 1


def test_json_lines_beside_the_loggers_hold_everything(tmp_path: Path) -> None:
    logger, probing = CSVLogger(tmp_path), new_callback()
    lightning_trainer(tmp_path, [probing], logger=logger).fit(Net(), loader())
    read = read_records(Path(logger.log_dir) / "curvature.jsonl")
    assert [record.to_json() for record in read] == [record.to_json() for record in probing.history]
    spectra = [record.arrays["eigenvalues"] for record in read if record.measurement == "empirical_fisher" and record.block]
    assert spectra
    assert {len(spectrum) for spectrum in spectra} == {6}  # N = 2 microbatches of 3 rows


def test_no_logger_at_all(tmp_path: Path) -> None:
    probing = new_callback()
    lightning_trainer(tmp_path, [probing], logger=False).fit(Net(), loader())
    assert_probed(probing.history, range(0, 7, 2))
    assert len(read_records(tmp_path / "curvature.jsonl")) == len(probing.history)


def test_fast_dev_run_measures_once_and_writes_nothing(tmp_path: Path) -> None:
    probing = new_callback()
    lightning_trainer(tmp_path, [probing], fast_dev_run=True, max_steps=-1, max_epochs=1).fit(Net(), loader())
    assert_probed(probing.history, [0])
    assert not list(tmp_path.rglob("*.jsonl"))


class SilentNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_barebones_trainer(tmp_path: Path) -> None:
    probing = new_callback()
    trainer = pl.Trainer(barebones=True, default_root_dir=tmp_path, callbacks=[probing], max_steps=3, accelerator="cpu")
    trainer.fit(SilentNet(), loader())
    assert_probed(probing.history, [0, 2])


def test_progress_bar_shows_the_sharpness(tmp_path: Path) -> None:
    probing = new_callback()
    trainer = lightning_trainer(tmp_path, [probing], enable_progress_bar=True)
    trainer.fit(Net(), loader())
    assert "curvature/hessian_lambda_max" in trainer.progress_bar_metrics


def test_validating_without_training(tmp_path: Path) -> None:
    probing = new_callback()
    lightning_trainer(tmp_path, [probing]).validate(ValidatedNet(), loader(shuffle=False), verbose=False)
    assert probing.history == []
    assert not list(tmp_path.iterdir())


def test_model_checkpoint_can_monitor_the_sharpness_long_after_a_probe(tmp_path: Path) -> None:
    monitor = "curvature/hessian_lambda_max"
    saving = ModelCheckpoint(dirpath=tmp_path, monitor=monitor, filename="best", every_n_epochs=1)
    stopping = EarlyStopping(monitor=monitor, patience=10, check_on_train_epoch_end=True)
    probing = new_callback(every_n_steps=100)
    trainer = lightning_trainer(tmp_path, [probing, saving, stopping], enable_checkpointing=True, max_steps=14)
    trainer.fit(ValidatedNet(), loader(), loader(shuffle=False))
    assert_probed(probing.history, [0])
    sharpness = next(record for record in probing.history if record.measurement == "hessian").scalars["lambda_max"]
    assert saving.best_model_score == pytest.approx(sharpness, rel=1e-6)
    assert Path(saving.best_model_path).exists()


def test_non_finite_scalars_reach_json_but_no_curve(tmp_path: Path) -> None:
    class Wild(Checksum):
        def measure(self, problem: Any, state: Any) -> Any:
            records, state = super().measure(problem, state)
            records[0].scalars.update(bad=math.inf, worse=math.nan)
            return records, state

    logger, probing = ListLogger(), new_callback(measure=[Wild()])
    lightning_trainer(tmp_path, [probing], logger=logger, max_steps=1).fit(Net(), loader())
    row = next(row for _, row in logger.rows if "curvature/checksum_value" in row)
    assert not any("bad" in key or "worse" in key for key in row)
    assert row["curvature_probe/non_finite"] == 2.0
    read = next(record for record in read_records(tmp_path / "curvature.jsonl") if record.measurement == "checksum")
    assert read.scalars["bad"] == math.inf
    assert math.isnan(read.scalars["worse"])


def test_an_unwritable_directory_is_reported_once(tmp_path: Path, caplog: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    plain = lightning_run(tmp_path)
    probed = lightning_run(blocked, new_callback())
    assert_same_training(plain, probed)
    assert_probed(probed.records, range(0, 7, 2))
    assert [report for report in reports(caplog) if "JSONLinesSink" in report] == reports(caplog)
    assert len(reports(caplog)) == 1


class BrokenLogger(CSVLogger):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("curvature") for name in metrics):
            raise OSError("no space left on device")
        super().log_metrics(metrics, step)


def test_a_logger_that_raises_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probing = new_callback(every_n_steps=2)
    trainer = lightning_trainer(tmp_path, [probing], max_steps=5, logger=BrokenLogger(str(tmp_path)))
    trainer.fit(Net(), loader())
    assert trainer.global_step == 5
    assert probed_steps(probing.history) == [0, 2, 4]
    assert len([record for record in caplog.records if "no space left" in record.getMessage()]) == 1
