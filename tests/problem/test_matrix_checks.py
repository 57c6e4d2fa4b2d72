"""What self-checks and errors of products say, in eigenpairs and in records."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import (
    EdgeRatio,
    RefusedError,
    SpectralDensity,
    TopEigenpairs,
    compute_spectrum,
)
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator
from tests.problem.matrix_cases import D, adam, measured, microbatches, network, truth


def test_a_density_of_differences_says_how_coarse_they_are():
    (record,) = measured(SpectralDensity(operator="finite_difference_hessian", num_probes=2, num_steps=5))
    assert 0 < record.scalars["product_error"] < 1e-3


def test_kinks_are_not_taken_for_curvature():
    """A staircase: its gradient jumps within every step."""

    class Staircase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=D))

        def forward(self, x: Tensor) -> Tensor:
            return ((self.w * x * 1e5) % 1.0 - 0.5).abs() / 1e5

    batch = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=D) + 0.5, torch.zeros(6, 8, dtype=D)

    def loss(model: nn.Module, rows: Any) -> Tensor:
        return model(rows[0]).sum(1)

    with pytest.raises(RefusedError, match="kinks"):
        compute_spectrum(Staircase(), batch, operator="finite_difference_hessian", loss=loss, k=2)


def test_the_error_of_the_differences_stands_in_the_record_and_bounds_the_error():
    record = measured(TopEigenpairs(operator="finite_difference_hessian", k=2, tol=1e-6, max_matvecs=60))[0]
    exact = torch.linalg.eigvalsh(truth("hessian"))[-1].item()
    assert 0 < record.scalars["product_error"] < 1e-3
    assert abs(record.scalars["lambda_max"] - exact) <= record.scalars["product_error"] * abs(exact) + 1e-9


def test_the_error_of_the_differences_is_that_of_the_worse_end(monkeypatch: pytest.MonkeyPatch):
    estimates = iter([0.0, 0.02, 0.05])  # of the self-check, the largest and the smallest
    monkeypatch.setattr(FiniteDifferenceHessianOperator, "error_estimate", lambda self, v: next(estimates))
    found = compute_spectrum(network(), microbatches(), operator="finite_difference_hessian", loss="cross_entropy", k=2)
    assert found.product_error == 0.05


def test_products_spent_on_the_error_of_the_differences_count(monkeypatch: pytest.MonkeyPatch):
    spent: dict[str, list[int]] = {"products": [], "estimates": []}
    multiply, estimate = FiniteDifferenceHessianOperator.matmat, FiniteDifferenceHessianOperator.error_estimate

    def multiplied(self: FiniteDifferenceHessianOperator, V: Tensor) -> Tensor:
        spent["products"].append(V.shape[1])
        return multiply(self, V)

    def estimated(self: FiniteDifferenceHessianOperator, v: Tensor) -> float:
        spent["estimates"].append(2)  # of a step, and of twice its length
        return estimate(self, v)

    monkeypatch.setattr(FiniteDifferenceHessianOperator, "matmat", multiplied)
    monkeypatch.setattr(FiniteDifferenceHessianOperator, "error_estimate", estimated)
    found = compute_spectrum(network(), microbatches(), operator="finite_difference_hessian", loss="cross_entropy", k=2)
    assert len(spent["estimates"]) == 3
    # those of the self-check are not the result's
    assert found.num_matvecs == sum(spent["products"]) + sum(spent["estimates"][1:])
    assert found.eigenvectors is None  # which were not asked for


class Square(torch.autograd.Function):
    """Taken as linear by a second backward pass. At the end of a model its Hessian stays symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0] * ctx.saved_tensors[0].detach()


def fused_loss(model: nn.Module, batch: Any) -> Tensor:
    return Square.apply(model(batch[0])).sum(1)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("cls", [TopEigenpairs, SpectralDensity])
def test_the_hessian_between_preconditioners_is_checked_like_any_other(cls: Any):
    model = network()
    options: Any = {"loss": fused_loss, "params_filter": None, "optimizer": adam(model)}
    with offline_problem(model, microbatches(), **options) as problem, pytest.raises(RefusedError, match="finite differences"):
        cls(operator="preconditioned_hessian").measure(problem, None)


@pytest.mark.parametrize(
    ("measurement", "state"),
    [
        (TopEigenpairs(k=1), {"error": 0.25, "starts": {}}),
        (SpectralDensity(num_probes=2, num_steps=2, deflate=0), 0.25),
        (EdgeRatio(), (0.25, None)),
    ],
    ids=["pairs", "density", "edge"],
)
def test_what_the_first_self_check_found_stands_in_every_later_record(measurement: Any, state: Any):
    model = network()
    options: Any = {"loss": "cross_entropy", "params_filter": None, "optimizer": adam(model)}
    with offline_problem(model, microbatches(), **options) as problem:
        ((record,), _) = measurement.measure(problem, state)
    assert record.metadata["asymmetry"] == 0.25


@pytest.mark.parametrize(
    ("cls", "state"),
    [(TopEigenpairs, {"error": 0.25, "starts": {"": torch.ones(60, dtype=D)}}), (SpectralDensity, 0.25)],
)
def test_a_probe_without_a_preconditioner_keeps_what_earlier_ones_found(cls: Any, state: Any):
    model = network()
    options: Any = {"loss": "cross_entropy", "params_filter": None, "optimizer": torch.optim.Adam(model.parameters())}
    with offline_problem(model, microbatches(), **options) as problem:
        ((record,), after) = cls(operator="preconditioned_hessian").measure(problem, state)
    assert "no step yet" in record.metadata["reason"]
    assert after is state
