"""Curvature of a network on the breast cancer data set, in a training loop of one's own.

python examples/plain_loop.py
"""

import argparse
import time
from pathlib import Path

import torch
from _closing import cleared, print_closing
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from curvature_callbacks import (
    CurvatureMonitor,
    FisherSpectrum,
    GradientNoise,
    JSONLinesSink,
    KFACCoverage,
    KFACQuality,
    TopEigenpairs,
)
from curvature_callbacks.sinks.tensorboard import TensorBoardSink


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logdir", type=Path, default=Path("runs/plain_loop"))
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50, help="optimizer steps between probes")
    return parser.parse_args()


def curvature_monitor(
    model: nn.Module, loader: DataLoader, *, every: int, logdir: Path, writer: SummaryWriter
) -> CurvatureMonitor:
    return CurvatureMonitor(
        model,
        probes=loader,  # its rows are indexed, the loader itself is never advanced
        loss="bce",
        measure=[
            FisherSpectrum(),
            KFACQuality(),  # from the same forward and backward pass
            GradientNoise(),  # likewise
            KFACCoverage(),
            FisherSpectrum(fisher="sampled"),  # labels drawn from the model: what natural gradients are about
            TopEigenpairs(k=2, per_block=True),
        ],
        when=every,
        sinks=[JSONLinesSink(logdir / "curvature.jsonl"), TensorBoardSink(writer)],
        num_microbatches=1,
        microbatch_size=64,
        draw="fixed",
    )


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(1)  # layers this small lose more to the second thread's waiting than they gain
    torch.manual_seed(0)
    logdir = cleared(options.logdir)

    features, malignant = load_breast_cancer(return_X_y=True)
    rows = TensorDataset(torch.tensor(StandardScaler().fit_transform(features)).float(), torch.tensor(malignant).float())
    loader = DataLoader(rows, batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(30, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    writer = SummaryWriter(str(logdir))
    monitor = curvature_monitor(model, loader, every=options.every, logdir=logdir, writer=writer)

    start = time.perf_counter()
    step = 0
    monitor.step(step)
    while step < options.max_steps:
        for inputs, targets in loader:
            loss = F.binary_cross_entropy_with_logits(model(inputs).squeeze(1), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            writer.add_scalar("loss", loss.item(), step)
            monitor.step(step)
            if step == options.max_steps:
                break
    writer.close()

    print(f"loss of the last batch {loss.item():.3f}")
    print_closing(monitor.history, training_seconds=time.perf_counter() - start, logdir=logdir)


if __name__ == "__main__":
    main()
