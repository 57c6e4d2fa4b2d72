"""Lightning modules, loggers and trainers of the tests, and runs of them to compare."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from tests.training_cases import Run, checksum, global_generators, loader, seed_everything

# Both frameworks say things about tiny CPU runs that are true and beside the point.
LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the data is 24 rows
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # lightning's own _pytree.py on a newer torch
    pytest.mark.filterwarnings("ignore:.*number of training batches"),  # fewer batches than log_every_n_steps
    pytest.mark.filterwarnings("ignore:.*ambiguous collection"),  # the case with two loaders
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended"),  # resuming within an epoch is what is tested
]


class Net(pl.LightningModule):
    """Everything a probe could disturb: BatchNorm, dropout, an activation that works in place, logging, metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("checksum", checksum(self))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class MeteredNet(Net):
    """With a torchmetric, a collection of them (which share state after their first update) and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        members = {"precision": MulticlassPrecision(3), "recall": MulticlassRecall(3)}
        self.collection = MetricCollection(members)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.collection.update(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        loss = F.cross_entropy(logits, y)
        self.log_dict({"train_loss": loss, "checksum": checksum(self)})
        return {"loss": loss}

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.collection.compute())
        self.collection.reset()


class FrozenNet(Net):
    """A BatchNorm the user keeps in evaluation mode while everything around it trains."""

    def on_train_epoch_start(self) -> None:
        self.layers[1].eval()
        self.layers[1].requires_grad_(False)


class ManualNet(Net):
    """Two optimizers, each stepping once a batch, so that `global_step` counts two a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        self.log("checksum", checksum(self))
        for optimizer in self.optimizers():
            loss = F.cross_entropy(self(x), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.layers[0].parameters(), lr=0.1, momentum=0.9)
        return [first, torch.optim.Adam(self.layers[4].parameters(), lr=0.01)]


def pair_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of each row, for `loss_fn`."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class ListLogger(Logger):
    """Keeps `(step, metrics)` in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "list"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return None

    @property
    def training(self) -> list[tuple[int, dict[str, float]]]:
        """The rows that are not the callback's."""
        return [row for row in self.rows if not any(key.startswith("curvature") for key in row[1])]


def lightning_trainer(directory: Any, callbacks: Sequence[Any] = (), **changes: Any) -> pl.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    fixed = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "max_epochs": -1, "max_steps": 7}
    return pl.Trainer(default_root_dir=directory, callbacks=list(callbacks), **(quiet | fixed | changes))


def lightning_run(
    directory: Any,
    callback: Any = None,
    *,
    net: Callable[[], pl.LightningModule] = Net,
    data: Callable[[], Any] = loader,
    **changes: Any,
) -> Run:
    """Train from a fixed seed; with `callback`, its records are in the run."""
    seed_everything()
    module, logger, train = net(), ListLogger(), data()
    trainer = lightning_trainer(directory, [callback] if callback else [], logger=logger, **changes)
    trainer.fit(module, train)
    return Run(
        state=dict(module.state_dict()) | {"training": [child.training for child in module.modules()]},
        optimizers=[optimizer.state_dict() for optimizer in trainer.optimizers],
        logged=logger.training,
        generators=global_generators(),
        records=list(callback.history) if callback else [],
    )
