"""What a loss does beside computing a number, in training, and must not do in a probe: the run with probes is the same bits."""

import copy
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer

from curvature_callbacks import CurvatureMonitor, TopEigenpairs
from curvature_callbacks.isolation.writes import WriteWatch
from curvature_callbacks.lightning.callback import CurvatureCallback
from tests.lightning_runs import LIGHTNING_WARNINGS, Net, lightning_run, lightning_trainer, pair_loss
from tests.training_cases import assert_probed, assert_same_training, callback_options, loader, seed_everything
from tests.transformers_runs import training_arguments

pytestmark = LIGHTNING_WARNINGS


class TeacherNet(Net):
    """Follows its student by a moving average, written in place at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.layers).requires_grad_(False)

    @torch.no_grad()
    def follow(self) -> None:
        for mine, its in zip(self.layers.parameters(), self.teacher.parameters(), strict=True):
            its.mul_(0.9).add_(mine, alpha=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.follow()
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), self.teacher(batch[0]))


class DataTeacherNet(TeacherNet):
    """The same through `.data`, which no version counter knows."""

    def follow(self) -> None:
        for mine, its in zip(self.layers.parameters(), self.teacher.parameters(), strict=True):
            its.data.mul_(0.9).add_(mine.data, alpha=0.1)


class SwappedTeacherNet(TeacherNet):
    """The same by other tensors under the same parameters."""

    def follow(self) -> None:
        for mine, its in zip(self.layers.parameters(), self.teacher.parameters(), strict=True):
            its.data = its.data * 0.9 + mine.data * 0.1


class AveragedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.layers).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.average.update_parameters(self.layers)
        return super().training_step(batch, batch_idx)


class PrototypeNet(Net):
    """Normalises a trainable weight before it is used."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.layers[4].weight.copy_(F.normalize(self.layers[4].weight, dim=1))
        return super().training_step(batch, batch_idx)


class StoppingNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if loss < 1.05:
            self.trainer.should_stop = True
        return loss


class RateNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 1.1
        return super().training_step(batch, batch_idx)


class ScheduledNet(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step:
            self.lr_schedulers().step()
        return super().training_step(batch, batch_idx)


class HyperparameterNet(Net):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.hparams["scale"] *= 1.01
        return super().training_step(batch, batch_idx) * self.hparams["scale"]


class TransferNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen += 1
        return [batch[0] * (1 + 0.01 * self.seen), batch[1]]


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class CountingNet(Net):
    """Objects of its own, one within another, scale the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = SimpleNamespace(count=0, within=SimpleNamespace(slotted=Slotted()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept.count += 1
        self.kept.within.slotted.count += 1
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.kept.count + 0.01 * self.kept.within.slotted.count)


class GrowingNet(Net):
    """Makes a part of itself in the first step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not hasattr(self, "made"):
            self.made = nn.Linear(6, 3).requires_grad_(False)
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), self.made(batch[0]))


class HookingNet(Net):
    """Hooks itself at the first call, and notes that it has: twice hooked, its loss has the part twice."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.collected: list[Tensor] = []
        if not hasattr(self, "hooked"):
            self.hooked = True
            self.layers[0].register_forward_hook(lambda layer, inputs, output: self.collected.append(output.square().mean()))
        return super().training_step(batch, batch_idx) + sum(self.collected)


class SparseNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(6).to_sparse(), persistent=False)
        self.register_buffer("unknown", torch.tensor(float("nan")).expand(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mixed = torch.sparse.mm(self.graph, batch[0].T).T
        return super().training_step([mixed, batch[1]], batch_idx)


class OneValueNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return UserDict(loss=super().training_step(batch, batch_idx).reshape(1))


class TemperatureNet(Net):
    """Anneals in `forward`, whoever asks for the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.temperature *= 0.99
        out: Tensor = super().forward(x) / self.temperature
        return out


class LoggingNet(Net):
    def curvature_loss(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("asked", loss)
        return loss


class DoubleNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = torch.ones(3) * 2  # of the default dtype, which Lightning makes float64 here
        return F.cross_entropy(self(batch[0]), batch[1], weight=weight)


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

    watching = CurvatureMonitor(model, probes=[batch], measure=[TopEigenpairs(k=1, tol=1e-6)], loss=loss)
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


# ------------------------------------------------------------------------------------------------------------- the watch


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: x.data.add_(1),
        lambda x: x[1:].zero_(),
        lambda x: x.view(-1).detach()[0].fill_(7),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch._foreach_mul_([x], 2.0),
        lambda x: x.copy_(torch.ones(3)),
    ],
    ids=["in place", "data", "part", "view", "out", "many", "copy"],
)
def test_every_way_of_writing_is_seen_and_undone(write: Callable[[Tensor], Any]) -> None:
    value, other = torch.arange(3.0), torch.ones(3)
    with WriteWatch() as watch:
        made = torch.zeros(3)
        made.add_(1)
        write(value)
    assert watch.changed(value)
    assert not watch.changed(other)
    watch.put_back()
    assert value.tolist() == [0, 1, 2]
    value.mul_(3)
    watch.put_back()
    assert value.tolist() == [0, 1, 2]
    assert made.tolist() == [1, 1, 1]


def test_a_tensor_made_longer_has_its_length_again() -> None:
    value = torch.arange(3.0)
    with WriteWatch() as watch:
        value.detach().resize_(6).fill_(1)
    watch.put_back()
    assert value.untyped_storage().nbytes() == 12
    assert value.tolist() == [0, 1, 2]


def test_writing_the_same_changes_nothing() -> None:
    value = torch.arange(3.0)
    with WriteWatch() as watch:
        value.clamp_(0, 9)
    assert not watch.changed(value)


# ---------------------------------------------------------------------------------------------------------- Hugging Face


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
