"""The probe's own loss beside the training loop's, and what is said where they are far apart."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvature_callbacks import CurvatureMonitor, KFACCoverage, TopEigenpairs
from tests.run.monitor_cases import example_batch, new_monitor

BATCHES = [tuple(part[start : start + 6] for part in example_batch(24)) for start in range(0, 24, 6)]


def network(*between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 3))


def mean_loss(model: nn.Module, batches: Any = BATCHES) -> float:
    return torch.stack([F.cross_entropy(model(x), y) for x, y in batches]).mean().item()


def probed(model: nn.Module, losses: Any, **changes: Any) -> Any:
    """The scalars of a probe after a loop that told these losses."""
    watching = new_monitor(model, probes=BATCHES, measure=[KFACCoverage()], when=len(losses), **changes)
    watching.check()
    for step, loss in enumerate(losses, start=1):
        records = watching.step(step, loss)
    return records[0].scalars


def test_both_losses_stand_in_the_record() -> None:
    model = network(nn.Dropout(0.5)).eval()
    expected = mean_loss(model)
    scalars = probed(model.train(), [1.5, torch.tensor(expected * 1.01)])
    assert scalars["probe_loss"] == pytest.approx(expected, rel=1e-6)
    assert scalars["training_loss"] == pytest.approx(expected * 1.01, rel=1e-6)
    assert "training_loss" not in probed(model, [None])


class Offset(nn.Module):
    """Has running statistics that are far from those of the batches, as at the start of training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        assert self.norm.running_var is not None
        self.norm.running_var += 1e8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 50 * self.norm(x)


class Noise(nn.Module):
    """Adds a lot in training mode, by chance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 40 * self.training * (torch.arange(8) + 0.01 * torch.rand_like(x))


def in_training(model: nn.Module) -> float:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        loss = mean_loss(model.train())
    model.load_state_dict(state)
    return loss


@pytest.mark.parametrize(
    ("between", "told", "reason"),
    [
        (Offset, in_training, "batch norm normalises by running statistics there"),
        (Noise, in_training, "what training mode does"),
        (nn.Tanh, lambda model: 9.0, "the rows or what is done to them are other ones"),
    ],
)
def test_losses_that_are_far_apart_are_said_once_with_the_reason(
    between: type[nn.Module], told: Callable[[nn.Module], float], reason: str, caplog: Any
) -> None:
    model = network(between())
    there = told(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        watching = CurvatureMonitor(model, probes=BATCHES, loss="cross_entropy", measure=[KFACCoverage()], when=2)
        for step in range(9):
            watching.step(step, there + 0.01 * step)
    (said,) = [record.getMessage() for record in caplog.records if "of the training loop" in record.getMessage()]
    assert reason in said
    assert f"{watching.history[0].scalars['probe_loss']:.4g}" in said
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_the_loss_of_batch_norms_that_are_measured_as_trained_is_that_of_training(caplog: Any) -> None:
    model = network(Offset())
    there = in_training(model)
    with caplog.at_level(logging.WARNING):
        watching = CurvatureMonitor(model, probes=BATCHES, loss="cross_entropy", measure=[TopEigenpairs(k=1)], when=2)
        for step in range(9):
            watching.step(step, there + 0.01 * step)
    losses = [record.scalars["probe_loss"] for record in watching.history if record.measurement == "probe"]
    assert losses == pytest.approx([there] * 5, rel=1e-5)
    assert "of the training loop" not in caplog.text


def test_losses_that_differ_by_less_than_their_spread_are_not(caplog: Any) -> None:
    model = network()
    loss = mean_loss(model)
    probed(model, [loss, 1.1 * loss, 0.9 * loss, 1.15 * loss])
    probed(model, [3 * loss, 0.2 * loss, 2 * loss, 4 * loss])  # far from it, and from each other
    probed(model, [3 * loss, 3 * loss, 3 * loss])  # too few
    assert "of the training loop" not in caplog.text
