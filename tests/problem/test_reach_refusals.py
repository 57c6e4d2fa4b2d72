"""Losses that have not the gradient they train by are refused before a number is logged."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import (
    ConfigurationError,
    CurvatureMonitor,
    KFACCoverage,
    Probes,
    TopEigenpairs,
    compute_fisher_spectrum,
    compute_spectrum,
)
from tests.problem.reach_cases import Shared, rows


def plain(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def detached(model: nn.Module, batch: Any) -> Tensor:
    return plain(model, batch).detach()


def without_gradients(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return plain(model, batch)


def of_no_parameter(model: nn.Module, batch: Any) -> Tensor:
    return batch[0].square().sum(1).requires_grad_()  # has a graph, of the data


def cached(model: nn.Module, batch: Any) -> Tensor:
    """As losses that cache gradients do it: the hook runs the backward pass that trains."""
    value = plain(model, batch)
    if not torch.is_grad_enabled():
        return value
    result = value.detach().requires_grad_()
    result.register_hook(lambda gradient: (value * gradient).backward())
    return result


def partly_cached(model: nn.Module, batch: Any) -> Tensor:
    return cached(model, batch) + 0.1 * sum(parameter.square().sum() for parameter in model.parameters())


LOSSES = pytest.mark.parametrize(
    ("loss", "match"),
    [
        (detached, "depends on no trainable parameter.*Return the loss as it is before"),
        (without_gradients, "depends on no trainable parameter"),
        (of_no_parameter, "depends on no trainable parameter"),
        (cached, "gradient a hook makes.*Pass the same loss without the cache"),
        (partly_cached, "gradient a hook makes"),
    ],
)


@LOSSES
def test_one_call_and_the_monitor_refuse_it_and_leave_the_model(loss: Callable[..., Tensor], match: str) -> None:
    model = Shared()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    checked, stepped = (CurvatureMonitor(model, probes=[rows()], loss=loss, measure=[TopEigenpairs()]) for _ in range(2))
    for refused in (
        checked.check,
        lambda: stepped.step(0),
        lambda: compute_spectrum(model, rows(), loss=loss, k=1),
        lambda: compute_fisher_spectrum(model, rows(), loss=loss),
    ):
        with pytest.raises(ConfigurationError, match=match):
            refused()
    assert not stepped.history
    for name, parameter in model.named_parameters():
        found, value = before[name]
        assert parameter is found
        assert parameter.grad is None
        assert torch.equal(parameter, value)


class Late(Probes):
    """Has no data at the check, as a stream."""

    def __init__(self) -> None:
        self.batches: Iterator[Any] = iter([None])

    def draw(self, seed: int) -> Any:
        return next(self.batches, [rows()])


@LOSSES
def test_of_a_stream_the_first_probe_records_it(loss: Callable[..., Tensor], match: str) -> None:
    watching = CurvatureMonitor(Shared(), probes=Late(), loss=loss, measure=[TopEigenpairs(), KFACCoverage()], when=1)
    watching.check()
    records = [record for record in watching.step(1) if record.measurement != "probe"]
    assert len(records) == 2
    assert all(record.error and not record.scalars for record in records)


def test_the_same_loss_with_its_graph_is_measured() -> None:
    records = CurvatureMonitor(Shared(), probes=[rows()], loss=plain, measure=[TopEigenpairs(), KFACCoverage()]).step(0)
    assert not any(record.failed for record in records)
