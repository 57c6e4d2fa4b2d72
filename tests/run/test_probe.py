"""One probe: a single problem, what the loss writes, the gradient that costs are counted in."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import ConfigurationError, CurvatureMonitor, FisherSpectrum, Probes, TopEigenpairs
from curvature_callbacks.run.settings import Settings
from curvature_callbacks.run.setup import Setup
from tests.run.monitor_cases import example_batch, row_losses
from tests.training_cases import Checksum, probed_steps, reports


class NoRows(Probes):
    def draw(self, seed: int) -> None:
        return None


@pytest.mark.parametrize("loss", ["cross_entropy", row_losses], ids=["named", "function"])
def test_a_probe_builds_one_problem(loss: Any) -> None:
    asked: list[str] = []  # once for each parameter of each problem

    def is_measured(name: str, parameter: Any) -> bool:
        asked.append(name)
        return True

    measure: list[Any] = [FisherSpectrum(), TopEigenpairs(k=1, max_matvecs=3)]
    monitor = CurvatureMonitor(
        nn.Linear(6, 3), probes=[example_batch()], loss=loss, params_filter=is_measured, measure=measure, when=1
    )
    monitor.check()
    for step in range(3):
        asked.clear()
        monitor.step(step)
        assert asked == ["weight", "bias"]
    assert not any(record.failed for record in monitor.history)


class Counting:
    """A loss that counts its calls in a tensor, once it is told to."""

    def __init__(self) -> None:
        self.is_writing = False
        self.count = torch.zeros(1)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if self.is_writing:
            self.count += 1
        return row_losses(model, batch)


def test_a_loss_that_begins_to_write_after_the_check_leaves_no_trace() -> None:
    loss = Counting()
    monitor = CurvatureMonitor(nn.Linear(6, 3), probes=[example_batch()], loss=loss, measure=[FisherSpectrum()], when=1)
    monitor.check()
    loss.is_writing = True
    monitor.step(0)
    assert loss.count.item() == 0
    assert not any(record.failed for record in monitor.history)


class WithoutGradient:
    """A loss whose value is known and whose gradient is not, from some step on."""

    def __init__(self) -> None:
        self.is_failing = False

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if self.is_failing and any(parameter.requires_grad for parameter in model.parameters()):
            raise RuntimeError("no gradient today")
        return row_losses(model, batch)


def test_a_gradient_that_fails_alone_is_said_once(caplog: Any) -> None:
    loss = WithoutGradient()
    monitor = CurvatureMonitor(nn.Linear(6, 3), probes=[example_batch()], loss=loss, measure=[Checksum()], when=1)
    monitor.check()
    loss.is_failing = True
    for step in range(3):
        assert "gradient_equivalents" not in monitor.step(step)[0].scalars
    assert probed_steps(monitor.history) == [0, 1, 2]
    assert not any(record.failed for record in monitor.history)
    assert len(reports(caplog)) == 1
    assert all(part in reports(caplog)[0] for part in ("no gradient today", "cost of a curvature probe", "said once"))


def test_a_gradient_that_fails_with_a_measurement_is_said_by_that(caplog: Any) -> None:
    loss = WithoutGradient()
    monitor = CurvatureMonitor(nn.Linear(6, 3), probes=[example_batch()], loss=loss, measure=[FisherSpectrum()], when=1)
    monitor.check()
    loss.is_failing = True
    monitor.step(0)
    assert len(reports(caplog)) == 1
    assert "`empirical_fisher` failed" in reports(caplog)[0]


def test_the_arguments_of_a_monitor_are_validated_once(monkeypatch: Any) -> None:
    calls: list[Settings] = []
    validate = Settings.__post_init__

    def noted(settings: Settings) -> None:
        calls.append(settings)
        validate(settings)

    monkeypatch.setattr(Settings, "__post_init__", noted)
    settings = Settings(draw="fixed")
    setup = Setup(model=nn.Linear(6, 3), settings=settings, probes=NoRows(), sinks=(), loss=None, optimizer=None)
    CurvatureMonitor.of(setup)
    assert calls == [settings]
    with pytest.raises(ConfigurationError, match="`draw` must be one of"):
        CurvatureMonitor(nn.Linear(6, 3), probes=NoRows(), draw="x")  # type: ignore[arg-type]
    assert len(calls) == 2
