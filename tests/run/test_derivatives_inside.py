"""Losses that take derivatives of their own (forces, residuals of equations, gradient penalties), in every pass of a run."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import CurvatureMonitor, FisherSpectrum, KFACCoverage, SpectralDensity, TopEigenpairs
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.model.loss.recording import is_recorded, value_only
from tests.reference import dense_hessian, fisher_eigenvalues, gradients_of, stacked


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.GELU(), nn.Linear(5, 1))


def points(size: int = 6) -> Tensor:
    return torch.randn(size, 2, generator=torch.Generator().manual_seed(0))


def derivative(values: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    return found


def forces(model: nn.Module, x: Tensor) -> Tensor:
    """(N,) from energies and their derivative, as potentials are trained."""
    x = x.detach().clone().requires_grad_()
    energy = model(x)[:, 0]
    return (energy - x.square().sum(1)).square() + F.mse_loss(derivative(energy, x), 2 * x, reduction="none").mean(1)


def residuals(model: nn.Module, x: Tensor) -> Tensor:
    """(N,) of `u_xx + u_yy = u`: second derivatives, so that a Hessian product is a fourth one."""
    x = x.detach().clone().requires_grad_()
    u = model(x)[:, 0]
    slope = derivative(u, x)
    return (derivative(slope[:, 0], x)[:, 0] + derivative(slope[:, 1], x)[:, 1] - u).square()


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    """(N,) of a critic whose slope is to be one; part of its parameters are not differentiated inside."""
    between = (0.5 * x).detach().requires_grad_()
    return model(x)[:, 0] + 10 * (derivative(model(between), between).norm(dim=1) - 1).square()


LOSSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {"forces": forces, "residuals": residuals, "penalty": penalty}


@pytest.mark.parametrize(("name", "is_mean"), [("forces", True), ("residuals", True), ("penalty", False)])
def test_spectra_of_a_loss_with_a_derivative_inside(name: str, is_mean: bool) -> None:
    of_rows, x = LOSSES[name], points()
    loss = (lambda model, batch: of_rows(model, batch).mean()) if is_mean else of_rows
    model = network()
    measure = [FisherSpectrum(), TopEigenpairs(k=2, tol=1e-6), SpectralDensity(num_probes=2, num_steps=6), KFACCoverage()]
    monitor = CurvatureMonitor(model, probes=[x[:4], x[4:]], loss=loss, measure=measure, when=1)
    monitor.check()
    records = {record.measurement: record for record in monitor.step(0) if record.block is None}
    assert not any(record.failed for record in records.values())
    names = [key for key, _ in model.named_parameters()]
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(model, lambda replica: of_rows(replica, x.double()).mean(), names))
    found = records["hessian"].scalars
    scale = float(eigenvalues.abs().max())
    assert found["lambda_max"] == pytest.approx(float(eigenvalues[-1]), abs=1e-4 * scale)
    assert found["lambda_min"] == pytest.approx(float(eigenvalues[0]), abs=1e-4 * scale)
    rows = [lambda replica, i=i: of_rows(replica, x[i : i + 1].double()).sum() for i in range(len(x))]
    fisher = fisher_eigenvalues(stacked(gradients_of(model, rows)))
    assert records["empirical_fisher"].scalars["full_trace"] == pytest.approx(float(fisher.sum()), rel=1e-4)
    fallback = records["empirical_fisher"].metadata["fallback"]
    assert fallback["2.weight"] == "the loss takes a derivative through its operation"


@pytest.mark.parametrize("operator", ["finite_difference_hessian", "empirical_fisher"])
def test_other_operators_of_such_a_loss(operator: Any) -> None:
    model, x = network().double(), points().double()
    with offline_problem(model, x, loss=residuals, params_filter=None) as problem:
        product = getattr(problem, operator)().matmat(torch.eye(21, dtype=torch.float64)[:, :3])
    if operator == "empirical_fisher":
        rows = [lambda replica, i=i: residuals(replica, x[i : i + 1]).sum() for i in range(len(x))]
        G = stacked(gradients_of(model, rows))
        expected, tolerance = (G.T @ G / len(x))[:, :3], 1e-10
    else:
        names = [key for key, _ in model.named_parameters()]
        expected, tolerance = dense_hessian(model, lambda replica: residuals(replica, x).mean(), names)[:, :3], 1e-4
    assert torch.allclose(product, expected, atol=tolerance * float(expected.abs().max()))


class Potential(nn.Module):
    """A model that returns its own loss, with forces in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(loss=forces(self.net, x).mean(), logits=None)


def test_a_models_own_loss_may_take_derivatives() -> None:
    model, x = Potential(), points()
    monitor = CurvatureMonitor(model, probes=[{"x": x, "labels": x[:, 0]}], measure=[FisherSpectrum()], when=1)
    monitor.check()
    (record,) = [record for record in monitor.step(0) if record.measurement == "empirical_fisher" and record.block is None]
    rows = [lambda replica, i=i: forces(replica, x[i : i + 1].double()).sum() for i in range(len(x))]
    fisher = fisher_eigenvalues(stacked(gradients_of(model.net, rows)))
    assert record.scalars["full_trace"] == pytest.approx(float(fisher.sum()), rel=1e-4)


def test_nothing_is_recorded_where_gradients_are_off() -> None:
    """The values of a loss with a derivative inside, without a graph, at parameters that require gradients."""
    with offline_problem(network(), points(), loss=forces, params_filter=None) as problem:
        leaves = problem.objective.leaves()
        with torch.no_grad():
            losses = problem.objective(problem.microbatches[0], leaves)
            assert not torch.is_grad_enabled()
        recorded = problem.objective(problem.microbatches[0], leaves)
    assert recorded.total.requires_grad
    assert torch.equal(losses.total, recorded.total)
    assert losses.per_sample is not None
    assert not losses.total.requires_grad
    assert not losses.per_sample.requires_grad


def test_a_pass_for_values_is_told_from_a_recorded_one() -> None:
    assert is_recorded()
    with torch.no_grad():
        assert not is_recorded()
        with value_only():
            assert torch.is_grad_enabled()
            assert not is_recorded()
    with pytest.raises(ZeroDivisionError), value_only():
        _ = 1 / 0
    assert is_recorded()
