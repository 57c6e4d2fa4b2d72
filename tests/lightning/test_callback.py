"""The Lightning callback: values at the right step, in every logger, errors before step 1. See also `tests.configurations`."""

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from curvature_callbacks import ConfigurationError, FisherSpectrum, LossSpike, RefusedError, TopEigenpairs, read_records
from curvature_callbacks.isolation import model as isolation
from curvature_callbacks.lightning.callback import CurvatureCallback
from tests.configurations.lightning_cases import ValidatedNet
from tests.lightning_runs import (
    LIGHTNING_WARNINGS,
    FrozenNet,
    ListLogger,
    ManualNet,
    Net,
    lightning_run,
    lightning_trainer,
    pair_loss,
)
from tests.training_cases import (
    AugmentedRows,
    Checksum,
    Raising,
    Rows,
    Stream,
    assert_equal,
    assert_probed,
    assert_same_training,
    callback_options,
    loader,
    num_hooks,
    probed_steps,
    reports,
)

pytestmark = LIGHTNING_WARNINGS


def callback(**changes: Any) -> CurvatureCallback:
    return CurvatureCallback(**callback_options(**changes))


class CountingNet(Net):
    """Counts what a probe must never do: training steps are only those of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.num_updates = 0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.num_updates += 1


# ------------------------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("bound_to", ["module", "datamodule"])
def test_a_collator_that_is_a_method_of_a_large_object(bound_to: str, tmp_path: Path) -> None:
    def collate(self: Any, rows: list[Any]) -> Any:
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    class CollatingNet(Net):
        collate_fn = collate

        def train_dataloader(self) -> Any:
            return loader(collate_fn=self.collate_fn)

    class Data(pl.LightningDataModule):
        collate_fn = collate

        def train_dataloader(self) -> Any:
            return loader(collate_fn=self.collate_fn)

    probing = callback()
    trainer = lightning_trainer(tmp_path, [probing], logger=TensorBoardLogger(tmp_path))
    trainer.fit(CollatingNet() if bound_to == "module" else Net(), Data() if bound_to == "datamodule" else None)
    assert_probed(probing.history, range(0, 7, 2))


# ----------------------------------------------------------------------------------------- these tests are able to fail


def test_a_measurement_that_draws_from_global_generators_is_harmless(tmp_path: Path) -> None:
    plain = lightning_run(tmp_path, data=lambda: loader(AugmentedRows()))
    probed = lightning_run(tmp_path, callback(measure=[Checksum()]), data=lambda: loader(AugmentedRows()))
    assert_probed(probed.records, range(0, 7, 2), {"checksum"})
    assert_same_training(plain, probed)


@pytest.mark.parametrize("part", ["_generators", "_training_flags"])
def test_without_a_part_of_the_isolation_training_differs(part: str, tmp_path: Path, monkeypatch: Any) -> None:
    from contextlib import contextmanager

    @contextmanager
    def forgetful(first: Any, *_: object) -> Any:
        if part == "_training_flags":
            first[0].eval()
        yield
        if part == "_training_flags":
            first[0].train()

    plain = lightning_run(tmp_path, net=FrozenNet, data=lambda: loader(AugmentedRows()))
    monkeypatch.setattr(isolation, part, forgetful)
    probed = lightning_run(tmp_path, callback(measure=[Checksum()]), net=FrozenNet, data=lambda: loader(AugmentedRows()))
    with pytest.raises(AssertionError, match=r"state|logged"):
        assert_same_training(plain, probed)


# ------------------------------------------------------------------------------------------------------------- step axis


def points(accumulator: EventAccumulator, tag: str) -> dict[int, float]:
    """Step to value; each step is written once."""
    found = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    assert len(dict(found)) == len(found), found
    return dict(found)


def events(directory: str | Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize(
    ("changes", "net", "expected"),
    [
        ({"max_steps": 7}, Net, [0, 3, 6]),
        ({"max_steps": 7, "accumulate_grad_batches": 3}, Net, [0, 3, 6]),
        ({"max_steps": 14}, ManualNet, [0, 2, 3, 5, 6]),  # two steps a batch: 3, 6, 9, 12 crossed at 4, 6, 10, 12
    ],
    ids=["plain", "accumulation", "two optimizers"],
)
def test_values_stand_where_the_loss_of_the_same_parameters_stands(
    changes: dict[str, Any], net: type[Net], expected: list[int], tmp_path: Path
) -> None:
    loss_fn = pair_loss if net is ManualNet else None
    probing = callback(every_n_steps=3, measure=[Checksum()], loss_fn=loss_fn)
    logger = TensorBoardLogger(tmp_path)
    lightning_trainer(tmp_path, [probing], logger=logger, **changes).fit(net(), loader())
    written = events(logger.log_dir)
    seen = points(written, "curvature/checksum_value")
    trained = points(written, "checksum")
    assert list(seen) == expected
    assert len(set(trained.values())) == len(trained) == 7
    assert seen == {step: trained[step] for step in expected}


# --------------------------------------------------------------------------------------------------------------- logging


def test_tensorboard_gets_curves_histograms_and_pictures_in_one_file(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    lightning_trainer(tmp_path, [callback()], logger=logger).fit(Net(), loader())
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
    lightning_trainer(tmp_path, [callback()], logger=logger).fit(Net(), loader())
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    assert [int(row["step"]) for row in rows if row["curvature/hessian_lambda_max"]] == [0, 2, 4, 6]
    assert [int(row["step"]) for row in rows if row["train_loss_step"]] == list(range(7))


def test_every_logger_is_served(tmp_path: Path) -> None:
    first, second = ListLogger(), ListLogger()
    lightning_trainer(tmp_path, [callback()], logger=[first, second]).fit(Net(), loader())
    assert first.rows == second.rows
    assert [step for step, row in first.rows if "curvature/probe_seconds" in row] == [0, 2, 4, 6]


def test_all_probes_log_the_same_tags(tmp_path: Path) -> None:
    logger = ListLogger()
    lightning_trainer(tmp_path, [callback()], logger=logger).fit(Net(), loader())
    keys = [frozenset(row) for _, row in logger.rows if "curvature/probe_seconds" in row]
    optional = {"curvature/hessian_most_negative_eigenvalue"}  # absent until one has converged
    assert len({key - optional for key in keys}) == 1


def test_json_lines_beside_the_loggers_hold_everything(tmp_path: Path) -> None:
    logger, probing = CSVLogger(tmp_path), callback()
    lightning_trainer(tmp_path, [probing], logger=logger).fit(Net(), loader())
    read = read_records(Path(logger.log_dir) / "curvature.jsonl")
    assert [record.to_json() for record in read] == [record.to_json() for record in probing.history]
    spectra = [record.arrays["eigenvalues"] for record in read if record.measurement == "empirical_fisher" and record.block]
    assert spectra
    assert {len(spectrum) for spectrum in spectra} == {6}  # N = 2 microbatches of 3 rows


def test_no_logger_at_all(tmp_path: Path) -> None:
    probing = callback()
    lightning_trainer(tmp_path, [probing], logger=False).fit(Net(), loader())
    assert_probed(probing.history, range(0, 7, 2))
    assert len(read_records(tmp_path / "curvature.jsonl")) == len(probing.history)


def test_fast_dev_run_measures_once_and_writes_nothing(tmp_path: Path) -> None:
    probing = callback()
    lightning_trainer(tmp_path, [probing], fast_dev_run=True, max_steps=-1, max_epochs=1).fit(Net(), loader())
    assert_probed(probing.history, [0])
    assert not list(tmp_path.rglob("*.jsonl"))


class SilentNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_barebones_trainer(tmp_path: Path) -> None:
    probing = callback()
    trainer = pl.Trainer(barebones=True, default_root_dir=tmp_path, callbacks=[probing], max_steps=3, accelerator="cpu")
    trainer.fit(SilentNet(), loader())
    assert_probed(probing.history, [0, 2])


def test_progress_bar_shows_the_sharpness(tmp_path: Path) -> None:
    probing = callback()
    trainer = lightning_trainer(tmp_path, [probing], enable_progress_bar=True)
    trainer.fit(Net(), loader())
    assert "curvature/hessian_lambda_max" in trainer.progress_bar_metrics


def test_validating_without_training(tmp_path: Path) -> None:
    probing = callback()
    lightning_trainer(tmp_path, [probing]).validate(ValidatedNet(), loader(shuffle=False), verbose=False)
    assert probing.history == []
    assert not list(tmp_path.iterdir())


def test_model_checkpoint_can_monitor_the_sharpness_long_after_a_probe(tmp_path: Path) -> None:
    monitor = "curvature/hessian_lambda_max"
    saving = ModelCheckpoint(dirpath=tmp_path, monitor=monitor, filename="best", every_n_epochs=1)
    stopping = EarlyStopping(monitor=monitor, patience=10, check_on_train_epoch_end=True)
    probing = callback(every_n_steps=100)
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

    logger, probing = ListLogger(), callback(measure=[Wild()])
    lightning_trainer(tmp_path, [probing], logger=logger, max_steps=1).fit(Net(), loader())
    row = next(row for _, row in logger.rows if "curvature/checksum_value" in row)
    assert not any("bad" in key or "worse" in key for key in row)
    assert row["curvature_probe/non_finite"] == 2.0
    read = next(record for record in read_records(tmp_path / "curvature.jsonl") if record.measurement == "checksum")
    assert read.scalars["bad"] == math.inf
    assert math.isnan(read.scalars["worse"])


# ----------------------------------------------------------------------------------------------------- checkpoint, resume


class SaveAt(pl.Callback):
    """Saves a checkpoint after so many steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def save_at(tmp_path: Path, step: int, callbacks: list[Any]) -> Path:
    path = tmp_path / "at.ckpt"
    lightning_trainer(tmp_path, [*callbacks, SaveAt(path, step)], max_steps=step).fit(Net(), loader())
    return path


def resume(tmp_path: Path, probing: CurvatureCallback, checkpoint: Path, max_steps: int = 9) -> None:
    lightning_trainer(tmp_path, [probing], max_steps=max_steps).fit(Net(), loader(), ckpt_path=checkpoint)


def test_resuming_goes_on_where_the_schedule_was(tmp_path: Path) -> None:
    first, second = callback(every_n_steps=3), callback(every_n_steps=3)
    resume(tmp_path, second, save_at(tmp_path, 5, [first]))
    assert probed_steps(first.history) == [0, 3]
    assert probed_steps(second.history) == [6]


def test_resuming_a_checkpoint_saved_after_training(tmp_path: Path) -> None:
    trainer = lightning_trainer(tmp_path, [callback(every_n_steps=3)], max_steps=5)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second = callback(every_n_steps=3)
    resume(tmp_path, second, tmp_path / "end.ckpt")
    assert probed_steps(second.history) == [6]


def test_resuming_a_checkpoint_without_the_callback_measures_at_once(tmp_path: Path) -> None:
    probing = callback(every_n_steps=3)
    resume(tmp_path, probing, save_at(tmp_path, 5, []))
    assert probed_steps(probing.history) == [5, 6]


def test_a_checkpoint_with_the_callback_loads_without_it(tmp_path: Path) -> None:
    trainer = lightning_trainer(tmp_path, [], max_steps=6)
    with pytest.warns(UserWarning, match="CurvatureCallback"):  # Lightning says that a callback of the checkpoint is missing
        trainer.fit(Net(), loader(), ckpt_path=save_at(tmp_path, 4, [callback()]))
    assert trainer.global_step == 6


def test_a_switched_off_measurement_stays_off_after_resuming(tmp_path: Path) -> None:
    first, second = (callback(measure=[Raising(error=RefusedError("never"))]) for _ in range(2))
    resume(tmp_path, second, save_at(tmp_path, 4, [first]))
    assert [record.measurement for record in first.history].count("raising") == 1
    assert [record.measurement for record in second.history].count("raising") == 0


def test_a_fresh_fit_after_a_resumed_one_starts_from_step_zero(tmp_path: Path) -> None:
    probing = callback()
    resume(tmp_path, probing, save_at(tmp_path, 4, [callback()]))
    resumed = len(probed_steps(probing.history))
    lightning_trainer(tmp_path, [probing], max_steps=5).fit(Net(), loader())
    assert probed_steps(probing.history)[resumed:] == [0, 2, 4]


def test_two_callbacks_with_different_intervals_in_one_trainer(tmp_path: Path) -> None:
    often, rarely = callback(measure=[Checksum()]), callback(every_n_steps=5)
    lightning_trainer(tmp_path, [often, rarely]).fit(Net(), loader())
    assert probed_steps(often.history) == [0, 2, 4, 6]
    assert probed_steps(rarely.history) == [0, 5]


# -------------------------------------------------------------------------------------------------------- misconfiguration


def assert_refused(tmp_path: Path, net: CountingNet, probing: CurvatureCallback, match: str, data: Any = None) -> None:
    """A ConfigurationError, before any optimizer step."""
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match=match):
        lightning_trainer(tmp_path, [probing], max_epochs=1).fit(net, loader() if data is None else data)
    assert net.num_updates == 0
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1, got 0"),
        ({"every_n_steps": 2.5}, "`every_n_steps`"),
        ({"every_n_steps": True}, "`every_n_steps`"),
        ({"num_microbatches": -1}, "`num_microbatches`"),
        ({"microbatch_size": "8"}, "`microbatch_size`"),
        ({"draw": "sometimes"}, "`draw` must be one of 'fresh', 'fixed', got 'sometimes'"),
        (
            {"block_structure": "layers"},
            "`block_structure` must be one of 'layer', 'component', 'module', 'parameter', 'none', a mapping",
        ),
        ({"block_structure": {"head": "fc"}}, "`block_structure` must map block 'head' to a list"),
        ({"measure": [FisherSpectrum]}, "`measure` must hold measurements.*pass an instance"),
        ({"measure": [TopEigenpairs(), TopEigenpairs(k=2)]}, "`measure` must hold measurements of different names"),
        ({"loss_fn": "l2"}, "`loss_fn` must be a function .* or one of 'cross_entropy', 'mse', 'bce', got 'l2'"),
    ],
)
def test_a_bad_argument_is_refused_at_construction(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match) as caught:
        callback(**changes)
    assert isinstance(caught.value, ValueError)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")  # so we are
def test_a_training_step_that_fetches_its_own_batches(tmp_path: Path) -> None:
    class Fetching(CountingNet):
        def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
            batch, *_ = next(dataloader_iter)
            return F.cross_entropy(self(batch[0]), batch[1])

    assert_refused(tmp_path, Fetching(), callback(), r"no `training_step\(batch, ...\)`.*`loss_fn")


def test_training_step_that_returns_none(tmp_path: Path) -> None:
    class Skipping(CountingNet):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            return None

    assert_refused(tmp_path, Skipping(), callback(), "returned NoneType without a loss.*`loss_fn=.*curvature_loss")


def test_manual_optimization_without_a_loss(tmp_path: Path) -> None:
    class Manual(CountingNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    assert_refused(tmp_path, Manual(), callback(), "optimizes manually.*`loss_fn=lambda.*curvature_loss")


def test_probes_follow_a_loader_that_is_made_anew(tmp_path: Path) -> None:
    seen: list[float] = []

    class Epochs(Net):
        def train_dataloader(self) -> Any:
            rows = [(torch.full((6,), float(self.current_epoch)), torch.tensor(0)) for _ in range(8)]
            return loader(rows)

    def watched(model: Any, batch: Any) -> torch.Tensor:
        seen.append(float(batch[0].max()))
        return pair_loss(model, batch)

    probing = callback(loss_fn=watched)
    lightning_trainer(tmp_path, [probing], max_steps=6, reload_dataloaders_every_n_epochs=1).fit(Epochs())
    assert_probed(probing.history, [0, 2, 4])
    assert sorted(set(seen)) == [0.0, 1.0, 2.0]


def test_a_loader_that_becomes_a_stream_leaves_the_data_before(tmp_path: Path, caplog: Any) -> None:
    class Turning(Net):
        def train_dataloader(self) -> Any:
            return loader() if self.current_epoch == 0 else loader(Stream(Rows()), shuffle=False)

    probing = callback()
    lightning_trainer(tmp_path, [probing], max_steps=8, reload_dataloaders_every_n_epochs=1).fit(Turning())
    assert_probed(probing.history, [0, 2, 4, 6])
    assert len([told for told in reports(caplog) if "stay with the data of the epochs before" in told]) == 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_state_survives_a_run_that_has_nothing_left_to_train(tmp_path: Path) -> None:
    first, second = callback(), callback()
    lightning_trainer(tmp_path, [first], enable_checkpointing=True, max_steps=4).fit(Net(), loader())
    trainer = lightning_trainer(tmp_path, [second], enable_checkpointing=True, max_steps=4)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    trainer.fit(Net(), loader(), ckpt_path=checkpoint)
    saved = torch.load(checkpoint, weights_only=False)["callbacks"][second.state_key]
    assert_equal(second.state_dict(), saved)
    assert saved
    lightning_trainer(tmp_path, [second], max_steps=3).fit(Net(), loader())
    assert probed_steps(second.history) == [0, 2]


def test_a_run_begins_without_the_loss_of_the_one_before(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (math.nan if self.global_step == 2 else 1)

    probing = callback(every_n_steps=200, spike=LossSpike(window=2))
    lightning_trainer(tmp_path, [probing], max_steps=3).fit(Broken(), loader())
    lightning_trainer(tmp_path, [probing], max_steps=3).fit(Net(), loader())
    assert {record.metadata["trigger"] for record in probing.history if record.measurement == "probe"} == {"schedule"}


class TellingNet(ManualNet):
    """Optimizes by hand and tells a loss that leaves its range at the batch 3."""

    def __init__(self, tell: Callable[[float], Any]) -> None:
        super().__init__()
        self.tell = tell

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        super().training_step(batch, batch_idx)
        return self.tell(1000.0 if batch_idx == 3 else 1.0)


@pytest.mark.parametrize(
    ("tell", "probed"),
    [
        (lambda loss: {"loss": torch.tensor([loss])}, [0, 4]),
        (torch.tensor, [0, 4]),
        (lambda loss: {"loss": torch.tensor([loss, loss])}, [0]),
        (lambda loss: {"other": loss}, [0]),
        (lambda loss: None, [0]),
    ],
    ids=["one value", "tensor", "two values", "no loss", "nothing"],
)
def test_a_spike_of_a_loss_told_under_manual_optimization(
    tell: Callable[[float], Any], probed: list[int], tmp_path: Path
) -> None:
    probing = callback(every_n_steps=200, spike=LossSpike(window=2), loss_fn=pair_loss)
    run = lightning_run(tmp_path, probing, net=lambda: TellingNet(tell), max_steps=14)
    assert_probed(run.records, probed)


def test_no_trainable_parameter(tmp_path: Path) -> None:
    assert_refused(tmp_path, CountingNet().requires_grad_(False), callback(), "no trainable parameter")


def test_params_filter_that_leaves_nothing(tmp_path: Path) -> None:
    assert_refused(tmp_path, CountingNet(), callback(params_filter=lambda name, parameter: False), "`params_filter`")


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (lambda module, batch: 1.0, "returned float instead of a tensor"),
        (lambda module, batch: module(batch[0]), r"returned shape \(3, 3\).*return a scalar mean or \(3,\) losses"),
        (lambda module, batch: module(batch["x"]), "the loss of a first probe could not be computed.*TypeError"),
    ],
    ids=["float", "matrix", "raises"],
)
def test_a_bad_loss_function(loss_fn: Any, match: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, CountingNet(), callback(loss_fn=loss_fn), match)


def test_training_step_with_variadic_arguments(tmp_path: Path) -> None:
    class Variadic(Net):
        def training_step(self, *args: Any) -> torch.Tensor:
            batch, batch_idx = args
            return super().training_step(batch, batch_idx)

    probing = callback()
    lightning_trainer(tmp_path, [probing], max_steps=3).fit(Variadic(), loader())
    assert_probed(probing.history, [0, 2])


# ------------------------------------------------------------------------------------------------ failures inside a probe

FAILURES = [
    RuntimeError("kernel"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ConfigurationError("late"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_an_exception_in_a_measurement_changes_nothing(error: Exception, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "curvature_callbacks")
    plain = lightning_run(tmp_path, net=FrozenNet)
    probed = lightning_run(tmp_path, callback(measure=[Raising(error=error), Checksum()]), net=FrozenNet)
    assert_same_training(plain, probed)
    failed = [record for record in probed.records if record.measurement == "raising"]
    assert [record.error for record in failed] == [f"{type(error).__name__}: {error}"] * 3  # then it is switched off
    assert [record.step for record in failed] == [0, 2, 4]
    assert all(not record.scalars for record in failed)
    assert_probed([record for record in probed.records if not record.failed], range(0, 7, 2), {"checksum"})
    said = reports(caplog)
    assert len(said) == 1 + isinstance(error, torch.OutOfMemoryError)  # that smaller microbatches are tried
    assert all("raising" in text and str(error) in text for text in said)


def test_a_refusal_switches_the_measurement_off_at_once(tmp_path: Path, caplog: Any) -> None:
    probing = callback(measure=[Raising(error=RefusedError("silently wrong")), Checksum()])
    lightning_run(tmp_path, probing)
    assert [record.step for record in probing.history if record.measurement == "raising"] == [0]
    assert len(reports(caplog)) == 1
    assert "switched off" in reports(caplog)[0]


def test_two_failures_and_a_success_do_not_switch_off(tmp_path: Path) -> None:
    probing = callback(every_n_steps=1, measure=[Raising(error=RuntimeError("x"), at=(0, 1, 3, 4))])
    lightning_run(tmp_path, probing)
    outcome = [(record.step, record.failed) for record in probing.history if record.measurement == "raising"]
    assert outcome == [(0, True), (1, True), (2, False), (3, True), (4, True), (5, False), (6, False)]


class Fragile(torch.nn.Module):
    """Fails in evaluation mode once training has begun, and is healthy otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.trained |= self.training
        if self.trained and not self.training:
            torch.rand(1)
            raise RuntimeError("only outside training")
        return x


class FragileNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers.append(Fragile())


def test_a_layer_that_fails_only_in_probes(tmp_path: Path, caplog: Any) -> None:
    plain = lightning_run(tmp_path, net=FragileNet)
    probed = lightning_run(tmp_path, callback(), net=FragileNet)
    assert_same_training(plain, probed)
    assert_probed([record for record in probed.records if record.step == 0], [0])
    later = [record for record in probed.records if record.step > 0 and record.measurement != "probe"]
    assert later
    assert all("only outside training" in (record.error or "") for record in later)
    failed = {record.step: record.scalars["failed"] for record in probed.records if record.measurement == "probe"}
    assert all(failed[step] > 0 for step in (2, 4, 6))
    assert len(reports(caplog)) == len({report.split("`")[1] for report in reports(caplog)})  # one each


class DivergingNet(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e30)


def test_a_diverged_run_goes_on_unchanged_and_nothing_is_reported_for_it(tmp_path: Path, caplog: Any) -> None:
    plain = lightning_run(tmp_path, net=DivergingNet, max_steps=4)
    probed = lightning_run(tmp_path, callback(), net=DivergingNet, max_steps=4)
    assert_same_training(plain, probed)
    diverged = [record for record in probed.records if record.step == 2 and record.measurement != "probe"]
    assert {record.measurement for record in diverged} == {"empirical_fisher", "hessian", "kfac_coverage"}
    assert all("finite" in str(record.error) or "nan" in str(record.error) for record in diverged)
    assert not any(record.scalars or record.arrays for record in diverged)
    assert len(reports(caplog)) == 3


def test_a_keyboard_interrupt_stops_training_and_restores_the_module(tmp_path: Path) -> None:
    net, probing = FrozenNet(), callback(measure=[Raising(error=KeyboardInterrupt(), at=(2,))])
    trainer = lightning_trainer(tmp_path, [probing])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(net, loader())
    assert trainer.global_step == 2
    assert [child.training for child in net.layers] == [True, False, True, True, True]
    assert net.layers[1].running_var.min() > 0  # the measurement had zeroed it
    assert not torch.is_inference_mode_enabled()


def test_an_unwritable_directory_is_reported_once(tmp_path: Path, caplog: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    plain = lightning_run(tmp_path)
    probed = lightning_run(blocked, callback())
    assert_same_training(plain, probed)
    assert_probed(probed.records, range(0, 7, 2))
    assert [report for report in reports(caplog) if "JSONLinesSink" in report] == reports(caplog)
    assert len(reports(caplog)) == 1


class Ending(IterableDataset[Any]):
    """A stream whose later batches hold nothing a probe could use."""

    def __iter__(self) -> Any:
        for i in range(7):
            yield (torch.ones(4, 6), torch.zeros(4).long()) if i < 3 else ("text", "only")


class TolerantNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) if isinstance(batch[0], torch.Tensor) else self.layers[4].bias.sum()


def test_a_batch_that_cannot_be_captured_does_not_stop_training(tmp_path: Path) -> None:
    probing = callback()
    trainer = lightning_trainer(tmp_path, [probing])
    trainer.fit(TolerantNet(), loader(Ending(), batch_size=None, shuffle=False))
    assert trainer.global_step == 7


@pytest.mark.parametrize("data", [loader, lambda: loader(Stream(Rows()), shuffle=False)], ids=["map", "stream"])
def test_no_hook_is_left_on_the_module(data: Callable[[], Any], tmp_path: Path) -> None:
    net = Net()
    lightning_trainer(tmp_path, [callback()], max_steps=3).fit(net, data())
    assert num_hooks(net) == 0
    assert "log" not in vars(net)
    assert "log_dict" not in vars(net)


class BrokenLogger(CSVLogger):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("curvature") for name in metrics):
            raise OSError("no space left on device")
        super().log_metrics(metrics, step)


def test_a_logger_that_raises_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probing = callback(every_n_steps=2)
    trainer = lightning_trainer(tmp_path, [probing], max_steps=5, logger=BrokenLogger(str(tmp_path)))
    trainer.fit(Net(), loader())
    assert trainer.global_step == 5
    assert probed_steps(probing.history) == [0, 2, 4]
    assert len([record for record in caplog.records if "no space left" in record.getMessage()]) == 1
