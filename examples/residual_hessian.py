"""A matrix of one's own, made of the package's: what the Gauss-Newton matrix leaves of the Hessian.

python examples/residual_hessian.py

The Hessian is `H = G + R`: the GGN G, which is never negative, and `R = sum_c (dL / dz_c) d2z_c / dtheta2`, through which alone
a Hessian can have negative eigenvalues. `curvature/residual_hessian_lambda_max` and `curvature/residual_hessian_lambda_min` are
the ends of R, to be read beside `curvature/ggn_lambda_max`: R fades as the errors `dL / dz` do, and Gauss-Newton becomes exact.
"""

import argparse
import time
from pathlib import Path

import torch
from _closing import cleared, print_closing
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from curvature_callbacks import CurvatureMonitor, FisherSpectrum, JSONLinesSink, LinearCombination, Problem, TopEigenpairs
from curvature_callbacks.sinks.tensorboard import TensorBoardSink


def residual_hessian(problem: Problem, names: tuple[str, ...] | None) -> LinearCombination:
    """`R = H - G` of these parameters; its name becomes that of the records."""
    return LinearCombination([(1.0, problem.hessian(names)), (-1.0, problem.ggn(names))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("runs/residual_hessian"))
    parser.add_argument("--max-steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logdir = cleared(options.logdir)
    features, cultivars = load_wine(return_X_y=True)
    inputs, targets = torch.tensor(StandardScaler().fit_transform(features)).float(), torch.tensor(cultivars)
    model = nn.Sequential(nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    monitor = CurvatureMonitor(
        model,
        probes=[(inputs, targets)],
        loss="cross_entropy",
        measure=[
            FisherSpectrum(),
            TopEigenpairs(k=2, per_block=True),
            TopEigenpairs(operator="ggn", k=1, which="LA"),
            TopEigenpairs(operator=residual_hessian, k=2),
        ],
        when=20,
        sinks=[JSONLinesSink(logdir / "curvature.jsonl"), TensorBoardSink(SummaryWriter(str(logdir)))],
    )
    start = time.perf_counter()
    for step in range(options.max_steps):
        monitor.step(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    ends = {record.measurement: record.scalars for record in monitor.history if record.block is None}
    residual, ggn = ends["residual_hessian"], ends["ggn"]
    print(f"R from {residual['lambda_min']:.3g} to {residual['lambda_max']:.3g}, G up to {ggn['lambda_max']:.3g}")
    print_closing(monitor.history, training_seconds=time.perf_counter() - start, logdir=logdir)


if __name__ == "__main__":
    main()
