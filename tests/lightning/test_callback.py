"""The Lightning callback in a run: values at the right step, data, loops of every kind. See also `tests.configurations`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from curvature_callbacks import LossSpike
from curvature_callbacks.isolation import model as isolation
from tests.lightning.callback_cases import events, new_callback, points
from tests.lightning_runs import LIGHTNING_WARNINGS, FrozenNet, ManualNet, Net, lightning_run, lightning_trainer, pair_loss
from tests.training_cases import (
    AugmentedRows,
    Checksum,
    Rows,
    Stream,
    assert_probed,
    assert_same_training,
    loader,
    num_hooks,
    reports,
)

pytestmark = LIGHTNING_WARNINGS


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

    probing = new_callback()
    trainer = lightning_trainer(tmp_path, [probing], logger=TensorBoardLogger(tmp_path))
    trainer.fit(CollatingNet() if bound_to == "module" else Net(), Data() if bound_to == "datamodule" else None)
    assert_probed(probing.history, range(0, 7, 2))


def test_a_measurement_that_draws_from_global_generators_is_harmless(tmp_path: Path) -> None:
    plain = lightning_run(tmp_path, data=lambda: loader(AugmentedRows()))
    probed = lightning_run(tmp_path, new_callback(measure=[Checksum()]), data=lambda: loader(AugmentedRows()))
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
    probed = lightning_run(tmp_path, new_callback(measure=[Checksum()]), net=FrozenNet, data=lambda: loader(AugmentedRows()))
    with pytest.raises(AssertionError, match=r"state|logged"):
        assert_same_training(plain, probed)


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
    probing = new_callback(every_n_steps=3, measure=[Checksum()], loss_fn=loss_fn)
    logger = TensorBoardLogger(tmp_path)
    lightning_trainer(tmp_path, [probing], logger=logger, **changes).fit(net(), loader())
    written = events(logger.log_dir)
    seen = points(written, "curvature/checksum_value")
    trained = points(written, "checksum")
    assert list(seen) == expected
    assert len(set(trained.values())) == len(trained) == 7
    assert seen == {step: trained[step] for step in expected}


def test_probes_follow_a_loader_that_is_made_anew(tmp_path: Path) -> None:
    seen: list[float] = []

    class Epochs(Net):
        def train_dataloader(self) -> Any:
            rows = [(torch.full((6,), float(self.current_epoch)), torch.tensor(0)) for _ in range(8)]
            return loader(rows)

    def watched(model: Any, batch: Any) -> torch.Tensor:
        seen.append(float(batch[0].max()))
        return pair_loss(model, batch)

    probing = new_callback(loss_fn=watched)
    lightning_trainer(tmp_path, [probing], max_steps=6, reload_dataloaders_every_n_epochs=1).fit(Epochs())
    assert_probed(probing.history, [0, 2, 4])
    assert sorted(set(seen)) == [0.0, 1.0, 2.0]


def test_a_loader_that_becomes_a_stream_leaves_the_data_before(tmp_path: Path, caplog: Any) -> None:
    class Turning(Net):
        def train_dataloader(self) -> Any:
            return loader() if self.current_epoch == 0 else loader(Stream(Rows()), shuffle=False)

    probing = new_callback()
    lightning_trainer(tmp_path, [probing], max_steps=8, reload_dataloaders_every_n_epochs=1).fit(Turning())
    assert_probed(probing.history, [0, 2, 4, 6])
    assert len([told for told in reports(caplog) if "stay with the data of the epochs before" in told]) == 1


def test_a_run_begins_without_the_loss_of_the_one_before(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (math.nan if self.global_step == 2 else 1)

    probing = new_callback(every_n_steps=200, spike=LossSpike(window=2))
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
    probing = new_callback(every_n_steps=200, spike=LossSpike(window=2), loss_fn=pair_loss)
    run = lightning_run(tmp_path, probing, net=lambda: TellingNet(tell), max_steps=14)
    assert_probed(run.records, probed)


def test_training_step_with_variadic_arguments(tmp_path: Path) -> None:
    class Variadic(Net):
        def training_step(self, *args: Any) -> torch.Tensor:
            batch, batch_idx = args
            return super().training_step(batch, batch_idx)

    probing = new_callback()
    lightning_trainer(tmp_path, [probing], max_steps=3).fit(Variadic(), loader())
    assert_probed(probing.history, [0, 2])


@pytest.mark.parametrize("data", [loader, lambda: loader(Stream(Rows()), shuffle=False)], ids=["map", "stream"])
def test_no_hook_is_left_on_the_module(data: Callable[[], Any], tmp_path: Path) -> None:
    net = Net()
    lightning_trainer(tmp_path, [new_callback()], max_steps=3).fit(net, data())
    assert num_hooks(net) == 0
    assert "log" not in vars(net)
    assert "log_dict" not in vars(net)
