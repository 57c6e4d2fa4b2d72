"""A measurement of one's own beside the built-in ones: python examples/custom_measurement.py"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _closing import cleared, print_closing
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from curvature_callbacks import CurvatureMonitor, FisherSpectrum, JSONLinesSink, Problem, Record, TopEigenpairs
from curvature_callbacks.sinks.tensorboard import TensorBoardSink


@dataclass(frozen=True)
class GradientNorm:
    """`curvature_gradient_norm/<block>`, norm of a block's mean gradient, and `curvature_gradient_norm/heat_map` of all."""

    name: str = "gradient"

    def init(self, problem: Problem) -> None:
        """Nothing to carry from probe to probe."""

    def measure(self, problem: Problem, state: None) -> tuple[list[Record], None]:
        records = []
        for block, names in problem.blocks.items():
            norm = torch.cat([problem.gradients[name].flatten() for name in names]).norm().item()
            record = Record(
                step=problem.step,
                measurement=self.name,
                block=block,
                scalars={"norm": norm},
                curves=("norm",),  # a curve a block; metrics not named here have minimum, median and maximum over blocks
            )
            records.append(record)
        return records, None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--logdir", type=Path, default=Path("runs/custom_measurement"))
    parser.add_argument("--max-steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logdir = cleared(options.logdir)
    features, progression = (torch.tensor(part).float() for part in load_diabetes(return_X_y=True))
    batch = 20 * features, (progression - progression.mean()) / progression.std()
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sinks = [JSONLinesSink(logdir / "curvature.jsonl"), TensorBoardSink(SummaryWriter(str(logdir)))]
    measure = [FisherSpectrum(), TopEigenpairs(k=2, per_block=True), GradientNorm()]
    monitor = CurvatureMonitor(model, probes=[batch], loss="mse", measure=measure, when=20, sinks=sinks)
    start = time.perf_counter()
    for step in range(options.max_steps):
        monitor.step(step)
        optimizer.zero_grad()
        F.mse_loss(model(batch[0]).squeeze(1), batch[1]).backward()
        optimizer.step()
    norms = {record.block: record.scalars["norm"] for record in monitor.history if record.measurement == "gradient"}
    print("last gradient norms:", ", ".join(f"{block} {norm:.3g}" for block, norm in norms.items()))
    print_closing(monitor.history, training_seconds=time.perf_counter() - start, logdir=logdir)
