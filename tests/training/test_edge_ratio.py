"""The edge of stability on real data: full-batch runs on the digits settle where the ratio is 1, in every kind of loop."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvature_callbacks import ConfigurationError, CurvatureMonitor, Record
from curvature_callbacks.lightning.callback import CurvatureCallback as LightningCallback
from curvature_callbacks.measurements import EdgeRatio
from curvature_callbacks.transformers.callback import CurvatureCallback as TransformersCallback
from tests.lightning_runs import LIGHTNING_WARNINGS, ManualNet, Net, lightning_run, lightning_trainer, pair_loss
from tests.training_cases import Run, assert_probed, assert_same_training, loader
from tests.transformers_runs import transformers_run

pytestmark = LIGHTNING_WARNINGS

NAMES = {"probe", "edge"}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1797 images, between 0 and 1, each pixel's mean taken off; one-hot labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images).float() / 16
    return x - x.mean(0), F.one_hot(torch.tensor(labels), 10).float()


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def half_squared_error(model: nn.Module, batch: Any) -> Tensor:
    return 0.5 * ((model(batch[0]) - batch[1]) ** 2).sum(1)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def ratios(records: list[Record]) -> dict[int, float]:
    return {
        record.step: record.scalars["ratio"] for record in records if record.measurement == "edge" and "ratio" in record.scalars
    }


def watched(loss: Any, build: Callable[[Any], torch.optim.Optimizer], num_steps: int, every: int) -> list[Record]:
    model = perceptron()
    optimizer = build(model.parameters())
    monitor = CurvatureMonitor(model, probes=[digits()], loss=loss, measure=[EdgeRatio()], when=every, optimizer=optimizer)
    for step in range(num_steps):
        monitor.step(step)
        optimizer.zero_grad()
        loss(model, digits()).mean().backward()
        optimizer.step()
    monitor.step(num_steps)
    assert not [record.error for record in monitor.history if record.failed]
    return monitor.history


def test_gradient_descent_settles_at_the_edge() -> None:
    found = ratios(watched(half_squared_error, lambda p: torch.optim.SGD(p, lr=0.6), 1000, 50))
    assert found[0] < 0.8
    assert all(abs(value - 1) < 0.1 for step, value in found.items() if step >= 750), found


@pytest.mark.slow
def test_adam_settles_at_the_edge() -> None:
    records = watched(half_squared_error, lambda p: torch.optim.Adam(p, lr=3e-3), 2000, 100)
    found = ratios(records)
    assert 0 not in found
    assert all(abs(value - 1) < 0.1 for step, value in found.items() if step >= 1500), found
    assert next(record for record in records if "limit" in record.scalars).scalars["limit"] == pytest.approx(38 / 3e-3)


def test_under_cross_entropy_it_stays_far_away() -> None:
    found = ratios(watched(cross_entropy, lambda p: torch.optim.SGD(p, lr=0.5), 1000, 100))
    assert all(value < 0.3 for value in found.values()), found
    assert found[1000] < 0.7 * max(found.values())


class Digits(LightningModule):
    """All digits are one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return half_squared_error(self, batch).mean()

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*digits()), batch_size=1797)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.6)


class OnceLoaded(Digits):
    """The whole batch as one row of a dataset, which takes a loader 1797 times less work."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*(part[None] for part in digits())), batch_size=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([part[0] for part in batch], batch_idx)


@pytest.mark.slow
def test_in_lightning_it_is_the_same_edge(tmp_path: Path) -> None:
    callback = LightningCallback(every_n_steps=50, measure=[EdgeRatio()], num_microbatches=1, microbatch_size=1)
    lightning_trainer(tmp_path, [callback], max_steps=901).fit(OnceLoaded())
    found = ratios(callback.history)
    assert found.keys() == set(range(0, 901, 50))
    assert all(abs(value - 1) < 0.1 for step, value in found.items() if step >= 700), found
    plain = ratios(watched(half_squared_error, lambda p: torch.optim.SGD(p, lr=0.6), 50, 50))
    assert {step: found[step] for step in plain} == pytest.approx(plain, rel=1e-2)


def edge_callback(kind: Any, **changes: Any) -> Any:
    return kind(every_n_steps=2, measure=[EdgeRatio()], num_microbatches=2, microbatch_size=3, **changes)


class Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Recording(Scheduled):
    """Keeps the rate each update really used."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def learning_rates(records: list[Record]) -> list[float]:
    return [record.scalars["learning_rate"] for record in records if record.measurement == "edge"]


@pytest.mark.parametrize("case", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=str)
def test_lightning_trains_as_without(case: dict[str, Any], tmp_path: Path) -> None:
    plain = lightning_run(tmp_path / "plain", net=Scheduled, **case)
    probed = lightning_run(tmp_path / "probed", edge_callback(LightningCallback), net=Scheduled, **case)
    assert_probed(probed.records, range(0, 7, 2), NAMES)
    assert_same_training(plain, probed)
    assert set(ratios(probed.records)) == {2, 4, 6}
    assert learning_rates(probed.records) == pytest.approx([0.1, 0.025, 0.1 / 16, 0.1 / 64])


def test_lightning_logs_the_rate_of_the_coming_step(tmp_path: Path) -> None:
    callback, net = edge_callback(LightningCallback), Recording()
    lightning_trainer(tmp_path, [callback]).fit(net, loader())
    assert learning_rates(callback.history) == net.rates[::2]


class Unoptimized(Net):
    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")
def test_lightning_without_an_optimizer_stops_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="none of the parameters"):
        lightning_run(tmp_path, edge_callback(LightningCallback), net=Unoptimized)


def test_several_optimizers_count_together(tmp_path: Path) -> None:
    callback = edge_callback(LightningCallback, loss_fn=pair_loss)
    run = lightning_run(tmp_path, callback, net=ManualNet, max_steps=14)
    assert not [record.error for record in run.records if record.failed]
    records = [record for record in run.records if record.measurement == "edge"]
    assert "ratio" in records[-1].scalars
    moving = [value.numel() for name, value in run.state.items() if name.startswith(("layers.0.", "layers.4."))]
    assert records[-1].metadata["num_params"] == sum(moving)  # the layer between them is in neither
    assert records[-1].metadata["optimizers"] == ["SGD", "Adam"]


def test_transformers_trains_as_without_and_logs_the_rate_of_the_coming_step(tmp_path: Path) -> None:
    def run(callback: Any, name: str) -> Run:
        return transformers_run(tmp_path / name, callback, lr_scheduler_type="linear", weight_decay=0.01)

    plain, probed = run(None, "plain"), run(edge_callback(TransformersCallback), "probed")
    assert_probed(probed.records, [0, 2, 4], NAMES)
    assert_same_training(plain, probed)
    assert set(ratios(probed.records)) == {2, 4}
    assert learning_rates(probed.records) == pytest.approx([1e-2, 0.6e-2, 0.2e-2])  # of updates 1, 3 and 5 of 5
    last = [record for record in probed.records if record.measurement == "edge"][-1]
    assert last.metadata["optimizers"] == ["AdamW"]
    assert last.scalars["limit"] == pytest.approx(38 / 0.2e-2, rel=1e-4)
