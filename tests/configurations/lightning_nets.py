"""Modules and data of the configurations of Lightning, each with what a probe could disturb."""

import random
from collections import defaultdict, deque
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from tests.lightning_runs import ManualNet, Net, pair_loss
from tests.training_cases import AugmentedRows, Rows, loader


class Noise:
    """A transform with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(2)

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand(6, generator=self.generator)


class Compose:
    """As torchvision's: a list of transforms."""

    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


class TransformedRows(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.transform = Compose([Noise()])

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.x[index]), self.y[index]


class RowsModule(pl.LightningDataModule):
    """The rows, for a command line."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(AugmentedRows(), batch_size=self.batch_size)


def pair() -> dict[str, Any]:
    """Six batches of one and four of the other."""
    return {"a": loader(AugmentedRows()), "b": loader(Rows(16))}


def evaluated() -> DataLoader[Any]:
    return loader(Rows(10), shuffle=False)


class TransferringNet(Net):
    """Batches become usable, and noisy, in the hooks of the transfer."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch[0], "y": batch[1]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"x": batch["x"] + 0.1 * torch.rand(6)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class TwoLoadersNet(Net):
    """Reads both of two batches, however they come; a loader that has ended gives None."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        both = [one for one in (batch.values() if isinstance(batch, dict) else batch) if one is not None]
        rows = [torch.cat(parts) for parts in zip(*both, strict=True)]
        return super().training_step(rows, batch_idx)


class FirstLoaderNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx)


class CurvatureLossNet(ManualNet):
    """Two optimizers, and a method that says what the loss is."""

    def curvature_loss(self, batch: Any) -> Tensor:
        return pair_loss(self, batch)


class CollectingNet(Net):
    """Keeps the outputs of an epoch in a list, as Lightning's migration guide says."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.outputs.append(loss := super().training_step(batch, batch_idx))
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("epoch_mean", torch.stack(self.outputs).mean())
        self.outputs.clear()


class RememberingNet(Net):
    """Remembers losses wherever a module can: nested, in a submodule, in a tensor that changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, list[Tensor]] = defaultdict(list)
        self.layers.seen = deque(maxlen=100)
        self.running = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.by_name["loss"].append(loss.detach())
        self.layers.seen.append(loss.detach())
        self.running += loss.detach()
        return loss

    def on_train_epoch_end(self) -> None:
        lists = {"nested": self.by_name["loss"], "in_submodule": list(self.layers.seen)}
        self.log_dict({name: torch.stack(losses).mean() for name, losses in lists.items()} | {"running": self.running})


class DirectlyLoggingNet(Net):
    """Writes to the logger itself rather than through `self.log`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
        return loss


class UnregisteredMetricNet(Net):
    """A metric `modules()` does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = {"accuracy": MulticlassAccuracy(3)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.metrics["accuracy"].update(self(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("accuracy", self.metrics["accuracy"].compute())
        self.metrics["accuracy"].reset()


class HalfFrozenNet(Net):
    """The first layers are a backbone: in evaluation mode and without gradients from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[:2].requires_grad_(False)
        self.layers[:2].eval()


class CompiledNet(Net):
    """A submodule compiled in place."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.layers.compile(backend=backend)


class SilentNet(Net):
    """Logs after its `training_step`: Dynamo cannot look through Lightning's `log`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("train_loss", outputs["loss"])


class ScheduledNet(Net):
    """A schedule that moves the momentum too."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ValidatedNet(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class NoisyNet(Net):
    """Its `training_step` draws, reads the Trainer and its own arguments, and counts."""

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.generator = torch.Generator().manual_seed(4)
        self.augment = Noise()
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        rate = self.optimizers().param_groups[0]["lr"]
        noise = torch.rand(6) + torch.rand(6, generator=self.generator) + np.random.rand() + random.random()
        x = self.augment(batch[0]) + self.hparams.strength * noise.float() * (1 + self.current_epoch)
        self.log("seen", float(self.calls) + rate + self.generator.get_state().float().mean())
        return super().training_step((x, batch[1]), batch_idx)


class Jitter(nn.Module):
    """Draws from a generator of its own, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape[1:], generator=self.generator)
        return x + 0.1 * noise if self.training else x


class JitteredNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers.insert(0, Jitter())


class ManyHooksNet(Net):
    """Gradients looked at and changed on their way."""

    def on_after_backward(self) -> None:
        self.log("norm", self.layers[0].weight.grad.norm())

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(self.layers.parameters(), 0.05)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("before", self.layers[0].weight.sum())


class SearchingNet(Net):
    """An optimizer that evaluates the loss several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class PlateauNet(Net):
    """A schedule that follows the loss."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "train_loss_epoch"}}


class LateNet(Net):
    """Its layers are made when training begins, and its callbacks are its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            self.layers = Net().layers

    def configure_callbacks(self) -> list[pl.Callback]:
        return [LearningRateMonitor("step"), EarlyStopping("train_loss_step", patience=100)]


class SpikingNet(Net):
    """Of one batch the loss is out of all proportion."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1000 if self.global_step == 3 else 1)


class TunedNet(Net):
    """What the finders change, as attributes."""

    def __init__(self, lr: float = 0.02, batch_size: int = 4) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(AugmentedRows(), batch_size=self.batch_size)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class ExactNet(Net):
    """Without noise, so that a checkpoint holds everything there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3] = nn.Identity()
