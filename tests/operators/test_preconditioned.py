"""`D^1/2 (A + C) D^1/2` against dense matrices, and the Hessian as Adam's own state preconditions it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, MatrixOperator, Operator, ProbeError, Problem, RefusedError, lanczos
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.operators.preconditioned import PreconditionedOperator
from tests.operators.operator_cases import dense
from tests.reference import dense_hessian

P = 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric() -> Tensor:
    A = normal(P, P)
    return A + A.T


def test_entries_are_those_of_the_product_between_roots() -> None:
    A, D, C = symmetric(), normal(P, seed=1).exp(), normal(P, seed=2).abs()
    found = dense(PreconditionedOperator(MatrixOperator(A), D, shift=C))
    for i in range(P):
        for j in range(P):
            entry = (A[i, j] + (C[i] if i == j else 0)) * (D[i] * D[j]) ** 0.5
            assert found[i, j].item() == pytest.approx(entry.item(), rel=1e-12)


def test_eigenvalues_are_those_of_the_product_with_the_scale() -> None:
    A, D = symmetric(), normal(P, seed=1).exp()
    operator = PreconditionedOperator(MatrixOperator(A), D)
    truth = torch.linalg.eigvals(D[:, None] * A).real.max().item()
    assert lanczos(operator, k=1, tol=1e-10).eigenvalues[0].item() == pytest.approx(truth, rel=1e-9)


def test_it_is_an_operator_like_its_inner_one() -> None:
    for dtype in (torch.float32, torch.float64):
        inner = MatrixOperator(symmetric().to(dtype), is_psd=True)
        operator = PreconditionedOperator(inner, normal(P, seed=1).exp())
        assert isinstance(operator, Operator)
        assert (operator.shape, operator.dtype, operator.device) == ((P, P), dtype, torch.device("cpu"))
        assert operator.is_psd
        V = normal(P, 3).to(dtype)
        kept = V.clone()
        together = operator.matmat(V)
        assert together.dtype == dtype
        assert torch.equal(V, kept)
        assert torch.equal(together, operator.matmat(V))
        torch.testing.assert_close(together, torch.cat([operator.matmat(v[:, None]) for v in V.T], dim=1))
    assert not PreconditionedOperator(MatrixOperator(symmetric()), torch.ones(P)).is_psd


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_has_no_root(wrong: float) -> None:
    scale = torch.ones(P)
    scale[2] = wrong
    with pytest.raises(ProbeError, match="1 of 6 entries"):
        PreconditionedOperator(MatrixOperator(symmetric()), scale)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="`scale` must have shape"):
        PreconditionedOperator(MatrixOperator(symmetric()), torch.ones(P - 1))
    with pytest.raises(ValueError, match="`shift` must have shape"):
        PreconditionedOperator(MatrixOperator(symmetric()), torch.ones(P), shift=torch.ones(P, 1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def seven_rows() -> Any:
    return normal(7, 4, seed=5), torch.tensor([0, 1, 2, 2, 1, 0, 1])


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(seven_rows()[0]), seven_rows()[1])


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 3) -> torch.optim.Optimizer:
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return optimizer


def problem_of(model: nn.Module, optimizer: Any, **options: Any) -> Problem:
    return Problem(model, [seven_rows()], loss="cross_entropy", optimizer=optimizer, **options)


@pytest.mark.parametrize("names", [None, ("2.weight", "0.bias")])
def test_the_preconditioned_hessian_is_the_dense_one(names: tuple[str, ...] | None) -> None:
    """P written out by hand from a recorded history of gradients, H one entry at a time."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, betas=(0.8, 0.95), eps=1e-3)
    history = []
    for _ in range(3):
        trained(model, optimizer, 1)
        history.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})  # type: ignore[union-attr]
    wanted = names or tuple(history[0])
    squares = {name: sum(0.05 * 0.95 ** (2 - i) * g[name] ** 2 for i, g in enumerate(history)) for name in wanted}
    P = torch.cat([(1 - 0.8**3) * ((squares[name] / (1 - 0.95**3)) ** 0.5 + 1e-3).flatten() for name in wanted])
    H = dense_hessian(model, loss, wanted)
    with isolated(model, seed=0):
        found = dense(problem_of(model, optimizer).preconditioned_hessian(names))
    torch.testing.assert_close(found, torch.diag(P**-0.5) @ H @ torch.diag(P**-0.5))


def test_under_gradient_descent_it_is_the_hessian() -> None:
    model = network()
    with isolated(model, seed=0):
        probed = problem_of(model, torch.optim.SGD(model.parameters(), lr=0.3))
        torch.testing.assert_close(dense(probed.preconditioned_hessian()), dense(probed.hessian()))


def test_only_what_moves_is_in_it() -> None:
    model = network()
    optimizer = trained(model, torch.optim.RMSprop(model[2].parameters()))
    with isolated(model, seed=0):
        assert problem_of(model, optimizer).preconditioned_hessian().shape == (18, 18)


def test_without_a_preconditioner_it_fails_with_the_reason() -> None:
    model = network()
    with isolated(model, seed=0):
        with pytest.raises(ConfigurationError, match="`optimizer` is needed"):
            problem_of(model, None).preconditioned_hessian()
        with pytest.raises(ProbeError, match="no step yet"):
            problem_of(model, torch.optim.Adam(model.parameters())).preconditioned_hessian()
        with pytest.raises(RefusedError, match="Adagrad"):
            problem_of(model, torch.optim.Adagrad(model.parameters())).preconditioned_hessian()
