"""What fails inside a probe of a Lightning run, and leaves training as it was."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from curvature_callbacks import ConfigurationError, RefusedError
from tests.lightning.callback_cases import new_callback
from tests.lightning_runs import LIGHTNING_WARNINGS, FrozenNet, Net, lightning_run, lightning_trainer
from tests.training_cases import Checksum, Raising, assert_probed, assert_same_training, loader, reports

pytestmark = LIGHTNING_WARNINGS

FAILURES = [
    RuntimeError("kernel"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ConfigurationError("late"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_an_exception_in_a_measurement_changes_nothing(error: Exception, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "curvature_callbacks")
    plain = lightning_run(tmp_path, net=FrozenNet)
    probed = lightning_run(tmp_path, new_callback(measure=[Raising(error=error), Checksum()]), net=FrozenNet)
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
    probing = new_callback(measure=[Raising(error=RefusedError("silently wrong")), Checksum()])
    lightning_run(tmp_path, probing)
    assert [record.step for record in probing.history if record.measurement == "raising"] == [0]
    assert len(reports(caplog)) == 1
    assert "switched off" in reports(caplog)[0]


def test_two_failures_and_a_success_do_not_switch_off(tmp_path: Path) -> None:
    probing = new_callback(every_n_steps=1, measure=[Raising(error=RuntimeError("x"), at=(0, 1, 3, 4))])
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
    probed = lightning_run(tmp_path, new_callback(), net=FragileNet)
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
    probed = lightning_run(tmp_path, new_callback(), net=DivergingNet, max_steps=4)
    assert_same_training(plain, probed)
    diverged = [record for record in probed.records if record.step == 2 and record.measurement != "probe"]
    assert {record.measurement for record in diverged} == {"empirical_fisher", "hessian", "kfac_coverage"}
    assert all("finite" in str(record.error) or "nan" in str(record.error) for record in diverged)
    assert not any(record.scalars or record.arrays for record in diverged)
    assert len(reports(caplog)) == 3


def test_a_keyboard_interrupt_stops_training_and_restores_the_module(tmp_path: Path) -> None:
    net, probing = FrozenNet(), new_callback(measure=[Raising(error=KeyboardInterrupt(), at=(2,))])
    trainer = lightning_trainer(tmp_path, [probing])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(net, loader())
    assert trainer.global_step == 2
    assert [child.training for child in net.layers] == [True, False, True, True, True]
    assert net.layers[1].running_var.min() > 0  # the measurement had zeroed it
    assert not torch.is_inference_mode_enabled()


class Ending(IterableDataset[Any]):
    """A stream whose later batches hold nothing a probe could use."""

    def __iter__(self) -> Any:
        for i in range(7):
            yield (torch.ones(4, 6), torch.zeros(4).long()) if i < 3 else ("text", "only")


class TolerantNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) if isinstance(batch[0], torch.Tensor) else self.layers[4].bias.sum()


def test_a_batch_that_cannot_be_captured_does_not_stop_training(tmp_path: Path) -> None:
    probing = new_callback()
    trainer = lightning_trainer(tmp_path, [probing])
    trainer.fit(TolerantNet(), loader(Ending(), batch_size=None, shuffle=False))
    assert trainer.global_step == 7
