"""Curvature of a residual network on handwritten digits, trained with Lightning.

python examples/lightning_digits.py
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch
from _closing import cleared, print_closing
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvature_callbacks import EdgeRatio, FisherSpectrum, KFACCoverage, TopEigenpairs
from curvature_callbacks.lightning.callback import CurvatureCallback


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.gelu(self.expand(self.norm(x))))


class DigitClassifier(LightningModule):
    """Members of a `ModuleList` are blocks, and so are the modules beside it: `stem`, `blocks.0` to `blocks.2`, `head`."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = F.cross_entropy(self(images), digits, label_smoothing=0.1)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, digits = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, digits))
        self.log("val_accuracy", (logits.argmax(1) == digits).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits_loaders() -> tuple[DataLoader, DataLoader]:
    images, digits = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, digits, test_size=0.25, random_state=0, stratify=digits)
    train_x, val_x, train_y, val_y = (torch.tensor(part) for part in split)
    train, validation = TensorDataset(train_x.float(), train_y), TensorDataset(val_x.float(), val_y)
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=512)


@torch.no_grad()
def accuracy(classifier: DigitClassifier, loader: DataLoader) -> float:
    hits = torch.cat([classifier(images).argmax(1) == digits for images, digits in loader])
    return hits.float().mean().item()


def quiet() -> None:
    """No hardware report, and no advice that does not matter for a data set of 1797 images in memory."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning 2.6 on torch 2.13
    torch.set_num_threads(1)  # layers this small lose more to the second thread's waiting than they gain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logdir", type=Path, default=Path("runs/lightning_digits"))
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="optimizer steps between probes")
    options = parser.parse_args()
    quiet()
    seed_everything(0, verbose=False)
    logdir = cleared(options.logdir)

    classifier = DigitClassifier()
    train_loader, validation_loader = digits_loaders()
    curvature = CurvatureCallback(
        every_n_steps=options.every,
        measure=[FisherSpectrum(), TopEigenpairs(k=2, per_block=True, max_matvecs=24), EdgeRatio(), KFACCoverage()],
        num_microbatches=1,
        microbatch_size=64,
        draw="fixed",
    )
    trainer = Trainer(
        max_steps=options.max_steps,
        callbacks=[curvature],  # the one line a training script needs
        logger=TensorBoardLogger(logdir, name=None, version=""),
        accelerator="cpu",
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(classifier, train_loader, validation_loader)
    seconds = time.perf_counter() - start

    print(f"validation accuracy {accuracy(classifier, validation_loader):.1%}")
    print_closing(curvature.history, training_seconds=seconds, logdir=logdir)


if __name__ == "__main__":
    main()
