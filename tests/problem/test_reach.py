"""Every trainable parameter is measured under its first name, or the loss that reads it is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvature_callbacks import (
    ConfigurationError,
    CurvatureMonitor,
    KFACCoverage,
    TopEigenpairs,
    compute_fisher_spectrum,
    compute_spectrum,
)
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.problem.problem import Problem
from tests.problem.reach_cases import (
    Listed,
    OnlyParameters,
    Shared,
    Tied,
    Unused,
    Wrapper,
    dense_by_live_parameters,
    rows,
)

MODELS = pytest.mark.parametrize("build", [Shared, Wrapper, Tied, Unused])
PAST = pytest.mark.parametrize("build", [Listed, OnlyParameters])


@MODELS
def test_problem_after_problem_has_the_hessian_of_all_parameters(build: Callable[[], nn.Module]) -> None:
    """As when memory runs out in a probe: the second one is made of the model that the first one used."""
    model = build()
    expected, parameters = dense_by_live_parameters(model), dict(model.named_parameters())
    with isolated(model, seed=0):
        for _ in range(2):
            problem = Problem(model, [rows()], loss="cross_entropy")
            problem.check()
            assert list(problem.objective.parameters) == list(parameters)
            H = problem.hessian().matmat(torch.eye(len(expected), dtype=torch.float64))
            assert torch.allclose(H, expected, rtol=1e-9, atol=1e-12)
            assert all(value is parameters[name] for name, value in model.named_parameters())


@MODELS
def test_the_optimizer_knows_every_parameter_during_a_probe(build: Callable[[], nn.Module]) -> None:
    """Of a module registered twice the preconditioned Hessian had lost its first layer: 445 for 1577."""
    model, (x, y) = build(), rows()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-3)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    chosen = [parameter for parameter in model.parameters() if parameter in optimizer.state]
    # P = (1 - beta_1^t) (sqrt(v_hat) + eps); after one step v_hat is the squared gradient.
    D = 0.1 * torch.cat([(p.grad.abs() + 1e-3).flatten() for p in chosen])  # type: ignore[union-attr]
    H = dense_by_live_parameters(model)
    H = H[: len(D), : len(D)]  # what has no gradient comes last
    expected = torch.linalg.eigvalsh(H / (D[:, None] * D).sqrt())[-1]
    watching = CurvatureMonitor(
        model,
        probes=[(x, y)],
        loss="cross_entropy",
        measure=[TopEigenpairs(), TopEigenpairs(operator="preconditioned_hessian", tol=1e-8)],
        optimizer=optimizer,
    )
    found = {record.measurement: record for record in watching.step(0) if record.block is None}
    assert found["preconditioned_hessian"].error is None
    assert found["preconditioned_hessian"].scalars["lambda_max"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_widened_model_is_left_as_found_also_by_a_loss_that_fails(dtype: torch.dtype) -> None:
    model = Wrapper().to(dtype)
    before = {name: (id(value), value.detach().clone()) for name, value in model.named_parameters(remove_duplicate=False)}

    def failing(module: nn.Module, batch: object) -> torch.Tensor:
        module(rows(torch.float32)[0])
        raise ArithmeticError

    wide = Wrapper().to(dtype).double()
    assert compute_spectrum(model, rows(dtype), loss="cross_entropy", k=1, which="LA").eigenvalues[0].item() == pytest.approx(
        dense_largest(wide, dtype), rel=1e-4
    )
    with pytest.raises(ArithmeticError):
        compute_fisher_spectrum(model, rows(dtype), loss=failing)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(id(after[name]) == identity and torch.equal(after[name], value) for name, (identity, value) in before.items())


def dense_largest(model: nn.Module, dtype: torch.dtype) -> float:
    x, y = rows(dtype)
    leaves = list(model.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(model(x.double()), y), leaves, create_graph=True)
    entries = torch.cat([part.flatten() for part in gradient])
    lines = [torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True) for entry in entries]
    H = torch.stack([torch.cat([part.flatten() for part in line]) for line in lines])
    return float(torch.linalg.eigvalsh(H)[-1])


@PAST
def test_a_parameter_that_is_read_past_its_module_is_refused_by_name(build: Callable[[], nn.Module]) -> None:
    watching = CurvatureMonitor(build(), probes=[rows()], loss="cross_entropy", measure=[KFACCoverage()])
    for refused in (watching.check, lambda: compute_spectrum(build(), rows(), loss="cross_entropy", k=1)):
        with pytest.raises(ConfigurationError, match=r"depends on `net\.2\.weight`, but reads it past the module"):
            refused()


def test_a_parameter_that_takes_no_part_is_none_that_is_missed() -> None:
    watching = CurvatureMonitor(Unused(), probes=[rows()], loss="cross_entropy", measure=[KFACCoverage()])
    assert not any(record.failed for record in watching.step(0))


def test_a_layer_that_is_not_measured_may_not_be_missed_either() -> None:
    """The loss would not follow it where it is widened or gathered."""
    with pytest.raises(ConfigurationError, match=r"net\.2\.weight"):
        compute_spectrum(
            Listed(), rows(), loss="cross_entropy", k=1, params_filter=lambda name, parameter: name.startswith("net.0")
        )
