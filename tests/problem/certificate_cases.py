"""A network of two layers with dropout, losses of its rows, and runs that compare them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import CurvatureMonitor, KFACCoverage
from curvature_callbacks.measurements import Measurement
from curvature_callbacks.model.loss.loop import LoopLoss
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.probes import FixedProbes
from curvature_callbacks.run.settings import Settings
from curvature_callbacks.run.setup import Setup

Function = Callable[[nn.Module, Any], Tensor]


class Net(nn.Module):
    """Dropout shows what is not evaluated in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(torch.tanh(self.first(x)), 0.3, self.training))


def microbatches(dtype: torch.dtype = torch.float32, number: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)) for _ in range(number)
    ]


def first_rows() -> tuple[Tensor, Tensor]:
    """The eighth of a probe's rows at which its objective is proved."""
    x, y = microbatches()[0]
    return x[:4], y[:4]


def plain(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def halved(model: nn.Module, batch: Any) -> Tensor:
    """As where it is divided by two steps of accumulation."""
    return plain(model, batch) / 2


def with_penalty(model: nn.Module, batch: Any) -> Tensor:
    return plain(model, batch) + 0.1 * sum(parameter.square().sum() for parameter in model.parameters())


def of_other_labels(model: nn.Module, batch: Any) -> Tensor:
    """As where labels are shifted once more."""
    return F.cross_entropy(model(batch[0]), batch[1].roll(1))


def of_the_head(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model.second(torch.tanh(model.first(batch[0])).detach()), batch[1])


def noisy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(F.dropout(model(batch[0]), 0.5, True), batch[1])


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    w = F.normalize(model(batch[0].flip(1)), dim=1)
    return F.cross_entropy(z @ w.T, torch.arange(len(z)))


def monitor(
    loss: Loss,
    trained: Function | None = None,
    *,
    model: nn.Module | None = None,
    batches: Any = None,
    measure: Any = None,
    is_by_choice: bool = False,
) -> CurvatureMonitor:
    measurements: list[Measurement] = [KFACCoverage()] if measure is None else measure
    loop = None
    if trained is not None:
        loop = LoopLoss(function=trained, name="`training_step`", is_by_choice=is_by_choice, advice="Leave it out.")
    return CurvatureMonitor.of(
        Setup(
            model=Net() if model is None else model,
            settings=Settings(every_n_steps=1, measure=measurements),
            probes=FixedProbes(microbatches() if batches is None else batches),
            sinks=[],
            loss=loss,
            optimizer=None,
            loop=loop,
        )
    )


def found(watching: CurvatureMonitor) -> Any:
    """What the record of a first probe says of the objective."""
    return watching.step(0)[0].metadata["objective"]


def by_autograd(function: Function, model: nn.Module, batch: Any) -> tuple[float, Tensor]:
    """Value and flat gradient in evaluation mode, by the model's own parameters."""
    value = function(model.eval(), batch)
    parts = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return value.item(), torch.cat([part.flatten() for part in parts])
