"""What a loss does beside computing a number, in training, and must not do in a probe: the run with probes is the same bits."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from curvature_callbacks import CurvatureMonitor, TopEigenpairs
from curvature_callbacks.lightning.callback import CurvatureCallback
from tests.isolation.trace_cases import (
    AveragedNet,
    CountingNet,
    DataTeacherNet,
    DoubleNet,
    GrowingNet,
    HookingNet,
    HyperparameterNet,
    LoggingNet,
    OneValueNet,
    PrototypeNet,
    RateNet,
    ScheduledNet,
    SparseNet,
    StoppingNet,
    SwappedTeacherNet,
    TeacherNet,
    TemperatureNet,
    TransferNet,
)
from tests.lightning_runs import LIGHTNING_WARNINGS, Net, lightning_run, lightning_trainer, pair_loss
from tests.training_cases import assert_probed, assert_same_training, callback_options, loader, seed_everything
from tests.transformers_runs import training_arguments

pytestmark = LIGHTNING_WARNINGS


@pytest.mark.parametrize(
    "net",
    [
        TeacherNet,
        DataTeacherNet,
        SwappedTeacherNet,
        AveragedNet,
        PrototypeNet,
        StoppingNet,
        RateNet,
        ScheduledNet,
        HyperparameterNet,
        TransferNet,
        CountingNet,
        GrowingNet,
        HookingNet,
        SparseNet,
        OneValueNet,
        LoggingNet,
    ],
)
def test_what_a_step_does_beside_its_loss(net: Callable[[], pl.LightningModule], tmp_path: Path) -> None:
    _assert_unharmed(net, tmp_path)


def test_double_precision_is_that_of_training(tmp_path: Path) -> None:
    _assert_unharmed(DoubleNet, tmp_path, precision="64-true")


@pytest.mark.parametrize("net", [TeacherNet, TemperatureNet])
def test_a_function_given_by_the_user_leaves_nothing_either(net: Any, tmp_path: Path) -> None:
    _assert_unharmed(net, tmp_path, loss_fn=lambda model, batch: _asked(model, batch))


def _asked(model: Any, batch: Any) -> Tensor:
    if isinstance(model, TeacherNet):
        model.follow()
    return pair_loss(model, batch)


def _assert_unharmed(net: Any, tmp_path: Path, loss_fn: Any = None, **changes: Any) -> None:
    plain = lightning_run(tmp_path / "plain", net=net, **changes)
    probing = CurvatureCallback(**callback_options(loss_fn=loss_fn))
    probed = lightning_run(tmp_path / "probed", probing, net=net, **changes)
    assert_same_training(plain, probed)
    assert_probed(probed.records, [record.step for record in probed.records if record.measurement == "probe"])
    assert probed.records


def test_a_data_module_counts_its_own_batches_only(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def train_dataloader(self) -> Any:
            return loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.seen += 1
            return batch

    counts = []
    for callbacks in ([], [CurvatureCallback(**callback_options())]):
        seed_everything()
        data = Data()
        lightning_trainer(tmp_path, callbacks).fit(Net(), datamodule=data)
        counts.append(data.seen)
    assert counts[0] == counts[1] == 7


@pytest.mark.parametrize("net", [TeacherNet, DataTeacherNet, SwappedTeacherNet])
def test_a_teacher_stands_still_within_a_probe(net: Any) -> None:
    """The eigenvalues are those with a teacher that has followed once, by the dense Hessian."""
    seed_everything()
    model = net()
    model._automatic_optimization = True
    batch = next(iter(loader(batch_size=24, shuffle=False)))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(model: Any, batch: Any) -> Tensor:
        model.follow()
        return F.cross_entropy(model(batch[0]), batch[1]) + 5 * F.mse_loss(model(batch[0]), model.teacher(batch[0]))

    measure = [TopEigenpairs(k=1, tol=1e-6)]
    watching = CurvatureMonitor(model, probes=[batch], measure=measure, loss=loss, batch_norm="eval")
    found = next(record for record in watching.step(0) if record.measurement == "hessian")
    assert not found.failed, found.error
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.scalars["lambda_max"] == pytest.approx(_dense_lambda_max(copy.deepcopy(model), batch), rel=1e-4)


def _dense_lambda_max(model: Any, batch: Any) -> float:
    model.follow()
    model.eval().double()
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    start = {name: value.detach() for name, value in model.named_parameters()}
    sizes = [start[name].numel() for name in names]

    def loss(flat: Tensor) -> Tensor:
        parts = {name: part.view_as(start[name]) for name, part in zip(names, flat.split(sizes), strict=True)}
        logits = torch.func.functional_call(model, {**start, **parts}, (batch[0].double(),))
        target = model.teacher(batch[0].double())
        return F.cross_entropy(logits, batch[1]) + 5 * F.mse_loss(logits, target)

    flat = torch.cat([start[name].flatten() for name in names])
    dense = torch.autograd.functional.hessian(loss, flat)
    return float(torch.linalg.eigvalsh(dense)[-1])


def test_a_teacher_that_a_function_holds_is_put_back() -> None:
    model, teacher = nn.Linear(6, 3), nn.Linear(6, 3).requires_grad_(False)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        for mine, its in zip(model.parameters(), teacher.parameters(), strict=True):
            its.data.lerp_(mine.detach(), 0.1)
        return F.cross_entropy(model(batch[0]), batch[1])

    before = copy.deepcopy(teacher.state_dict())
    batch = next(iter(loader()))
    records = CurvatureMonitor(model, probes=[batch], measure=[TopEigenpairs(k=1)], loss=loss).step(0)
    assert not any(record.failed for record in records)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_stream_of_tuples_under_a_loss_of_the_trainers_own(tmp_path: Path) -> None:
    from curvature_callbacks.transformers.loss import ComputeLossWatch

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return F.cross_entropy(model(inputs[0]), inputs[1])

    model = nn.Linear(6, 3)
    trainer = Own(model=model, args=training_arguments(tmp_path))
    offered: list[Any] = []
    watch = ComputeLossWatch(trainer, offered.append)
    batch = next(iter(loader()))
    trainer.compute_loss(model.train(), batch)
    watch.remove()
    assert offered[0] is batch
