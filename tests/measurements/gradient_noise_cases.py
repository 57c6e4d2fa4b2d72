"""Models, rows and single probes that the tests of gradient noise share."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import GradientNoise, Record
from curvature_callbacks.compute.offline import offline_problem
from tests.cases import CASES

CASE = CASES["mlp"]


Batch = tuple[Tensor, Tensor]


def digits() -> Batch:
    features, labels = load_digits(return_X_y=True)
    features = torch.tensor(features)
    return (features - features.mean(0)) / 8.0, torch.tensor(labels)


def network(num_inputs: int = 64, num_outputs: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(num_inputs, 16), nn.Tanh(), nn.Linear(16, num_outputs)).double()


def measured(
    model: nn.Module, batches: Any, state: Any = None, *, measurement: GradientNoise | None = None, **options: Any
) -> tuple[list[Record], Any]:
    measurement = measurement or GradientNoise()
    options = {"loss": "cross_entropy", "params_filter": None} | options
    with offline_problem(model, batches, **options) as problem:
        return measurement.measure(problem, state or measurement.init(problem))


def model_record(model: nn.Module, batches: Any, state: Any = None, **options: Any) -> Record:
    return measured(model, batches, state, **options)[0][0]


def descend(model: nn.Module, batch: Batch, rate: float = 0.5) -> None:
    gradients = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= rate * gradient
