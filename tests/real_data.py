"""Small models and real data for whole training runs: scikit-learn's digits, Python's help texts."""

import pydoc_data.topics
from typing import Any

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvature_callbacks import CurvatureMonitor
from tests.training_cases import Run, global_generators, seed_everything


def digits() -> DataLoader[Any]:
    images, labels = load_digits(return_X_y=True)
    rows = TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8)[:96] / 16, torch.tensor(labels)[:96])
    return DataLoader(rows, batch_size=16, shuffle=True)


def convolutions() -> nn.Sequential:
    features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.MaxPool2d(4))
    return nn.Sequential(features, nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 10))


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = convolutions()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Characters(Dataset[Any]):
    """The first lines of Python's `help()` topics, 12 characters a row, of the 17 most frequent ones."""

    def __init__(self) -> None:
        text = "".join(pydoc_data.topics.topics.values())[:2000]
        frequent = sorted(set(text), key=text.count, reverse=True)[:17]
        kept = torch.tensor([frequent.index(character) for character in text if character in frequent])
        self.rows = kept[: len(kept) // 8 * 8].view(-1, 8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def digit_loop(watch: dict[str, Any] | None, *, every: int) -> Run:
    """An epoch in a loop of one's own; `watch` are options of the monitor, None for none."""
    seed_everything()
    model, loader = convolutions(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options: dict[str, Any] = {"when": every, "loss": "cross_entropy", "optimizer": optimizer} | (watch or {})
    monitor = None if watch is None else CurvatureMonitor(model, probes=loader, **options)
    losses = []
    for step, (x, y) in enumerate(loader):
        if monitor:
            monitor.step(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = dict(model.state_dict()) | {"training": [module.training for module in model.modules()]}
    records = monitor.history if monitor else []
    return Run(state, [optimizer.state_dict()], losses, global_generators(), records)
