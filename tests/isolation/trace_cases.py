"""Lightning modules whose steps do something beside computing a loss."""

import copy
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from tests.lightning_runs import Net


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
