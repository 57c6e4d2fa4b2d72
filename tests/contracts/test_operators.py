"""What every operator promises: a fixed symmetric linear map on flat vectors that leaves the model as it found it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import MatrixOperator, Problem
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.linalg.combination import LinearCombination
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.stability import read_stability
from curvature_callbacks.operators.capabilities import eigenpairs, self_check
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator, SampledFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.hessian import HessianOperator
from curvature_callbacks.operators.kfac import KFACOperator
from curvature_callbacks.operators.preconditioned import PreconditionedOperator
from tests.cases import CASES
from tests.reference import relative_error


@dataclass(frozen=True)
class Contract:
    """How an operator is built, and how far its products may be off, relative to the largest, by dtype."""

    build: Callable[[Problem], Operator]
    float32: float = 1e-4
    float64: float = 1e-10
    covers_all: bool = True  # whether its vectors span every parameter


def of(cls: Callable[..., Operator], **options: Any) -> Callable[[Problem], Operator]:
    return lambda problem: cls(problem.objective, problem.microbatches, **options)


def low_rank(problem: Problem) -> Tensor:
    """(P, 5)"""
    P = sum(value.numel() for value in problem.objective.parameters.values())
    return torch.randn(P, 5, generator=torch.Generator().manual_seed(3), dtype=problem.objective.dtype)


def low_rank_matrix(problem: Problem) -> Operator:
    G = low_rank(problem)
    return MatrixOperator(G @ G.T, is_psd=True)


class Mine:
    """What a user writes, with nothing of this package in it: `G G' - 1`."""

    is_psd = False

    def __init__(self, G: Tensor) -> None:
        self._G = G
        self.shape, self.dtype, self.device = (len(G), len(G)), G.dtype, G.device

    def matmat(self, V: Tensor) -> Tensor:
        return self._G @ (self._G.T @ V) - V


def combination(problem: Problem) -> Operator:
    hessian, fisher = of(HessianOperator)(problem), of(EmpiricalFisherOperator)(problem)
    return LinearCombination([(1.0, hessian), (-0.5, fisher)], shift=0.1)


def preconditioned(problem: Problem) -> Operator:
    """By the state that Adam has after the steps of the fixture."""
    named = dict(problem.model.named_parameters())
    wanted = {name: named[name] for name in problem.objective.parameters}
    stability = read_stability(problem.optimizer, wanted, dtype=problem.objective.dtype)
    assert stability.preconditioner is not None
    return PreconditionedOperator(of(HessianOperator)(problem), 1 / stability.preconditioner)


# Append a builder here.
OPERATORS: dict[str, Contract] = {
    "matrix": Contract(low_rank_matrix),
    "a user's": Contract(lambda problem: Mine(low_rank(problem))),
    "hessian": Contract(of(HessianOperator)),
    "difference": Contract(of(FiniteDifferenceHessianOperator), float32=3e-3, float64=1e-5),
    "preconditioned hessian": Contract(preconditioned),
    "ggn": Contract(of(GGNOperator)),
    "empirical Fisher": Contract(of(EmpiricalFisherOperator)),
    "empirical Fisher of tokens": Contract(of(EmpiricalFisherOperator, sample_unit="token")),
    "sampled Fisher": Contract(of(SampledFisherOperator)),
    "sampled Fisher of tokens": Contract(of(SampledFisherOperator, sample_unit="token", num_draws=3, seed=3)),
    "kfac": Contract(lambda problem: problem.kfac(sharing="expand", corrected=False), covers_all=False),
    "ekfac": Contract(lambda problem: problem.kfac(sharing="expand", corrected=True), covers_all=False),
    "combination": Contract(combination),
}
# Case to the prefixes of the parameters to differentiate by: tokens; buffers and modules with a state of their own.
MODELS = {"gpt2": ("transformer.h.1.ln_1", "transformer.h.1.attn.c_proj", "transformer.ln_f"), "convnet": ("",)}
SIZES = (2, 1, 2)


@dataclass(frozen=True)
class OperatorUnderTest:
    """Made once for all tests, which only read it; `products` are those of `U`, eight vectors."""

    problem: Problem
    build: Callable[[], Operator]
    tolerance: float
    covers_all: bool
    operator: Operator
    U: Tensor
    products: Tensor


def vectors(operator: Operator, count: int) -> Tensor:
    """(P, count) of the operator's dtype."""
    return torch.randn(operator.shape[0], count, generator=torch.Generator().manual_seed(0), dtype=operator.dtype)


def stepped(model: nn.Module) -> torch.optim.Adam:
    """Adam after two steps along random gradients."""
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=1e-4, eps=1e-2), torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.fixture(scope="module", params=[("gpt2", "float32"), ("convnet", "float32"), ("convnet", "float64")], ids=" ".join)
def model(request: Any) -> tuple[str, torch.dtype]:
    return request.param[0], getattr(torch, request.param[1])


@pytest.fixture(scope="module", params=OPERATORS)
def subject(request: Any, model: tuple[str, torch.dtype]) -> Iterator[OperatorUnderTest]:
    contract, (case, dtype) = OPERATORS[request.param], model
    tolerance = {torch.float32: contract.float32, torch.float64: contract.float64}[dtype]
    options: Any = {"loss": CASES[case].loss, "params_filter": lambda name, _: name.startswith(MODELS[case])}
    trained = CASES[case].model(dtype).train()
    optimizer = stepped(trained)
    with offline_problem(trained, CASES[case].microbatches(SIZES), **options) as problem:
        problem.optimizer = optimizer
        operator = contract.build(problem)
        U = vectors(operator, 8)
        yield OperatorUnderTest(
            problem, lambda: contract.build(problem), tolerance, contract.covers_all, operator, U, operator.matmat(U)
        )


def traces(problem: Problem) -> dict[str, Any]:
    """Everything of the model and the process that a product might touch."""
    model = problem.model
    return {
        "parameters": [(p.data_ptr(), p._version, p.detach().clone(), p.requires_grad) for p in model.parameters()],
        "gradients": [(id(p.grad), p.grad.clone()) for p in model.parameters() if p.grad is not None],
        "buffers": [(buffer.data_ptr(), buffer.clone()) for buffer in model.buffers()],
        "flags": [(module.training, len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()],
        "batches": [[value.clone() for value in _values(each.content)] for each in problem.microbatches],
        "optimizer": [value.clone() for state in problem.optimizer.state.values() for value in state.values()],
        "generator": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def _values(batch: Any) -> list[Tensor]:
    return list(batch.values()) if isinstance(batch, dict) else list(batch)


def same(found: Any, expected: Any) -> bool:
    if isinstance(found, Tensor):
        return torch.equal(found, expected)
    if isinstance(found, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


class TestOperator:
    def test_it_is_an_operator(self, subject: OperatorUnderTest) -> None:
        operator = subject.operator
        P = operator.shape[0]
        sizes = {name: value.numel() for name, value in subject.problem.objective.parameters.items()}
        assert isinstance(operator, Operator)
        assert operator.shape == (P, P)
        if subject.covers_all:
            assert sum(sizes.values()) == P
        else:
            assert isinstance(operator, KFACOperator)
            assert sum(sizes[name] for name in operator.names) == P
            assert {*operator.names, *operator.uncovered} == set(sizes)
        assert operator.dtype == subject.problem.objective.dtype
        assert operator.device == subject.problem.objective.device
        assert isinstance(operator.is_psd, bool)

    def test_shape_and_dtype_of_products(self, subject: OperatorUnderTest) -> None:
        for V, product in (subject.U, subject.products), (subject.U[:, :1], subject.operator.matmat(subject.U[:, :1])):
            assert product.shape == V.shape
            assert product.dtype == subject.operator.dtype
            assert product.device == subject.operator.device
            assert not product.requires_grad
            assert product.isfinite().all()
            assert product.any()

    def test_it_is_symmetric(self, subject: OperatorUnderTest) -> None:
        forms = subject.U.T @ subject.products
        assert relative_error(forms, forms.T) < subject.tolerance

    def test_it_is_linear(self, subject: OperatorUnderTest) -> None:
        U, products = subject.U, subject.products
        combined = subject.operator.matmat(2 * U[:, :1] - 3 * U[:, 1:2])
        assert relative_error(combined, 2 * products[:, :1] - 3 * products[:, 1:2]) < subject.tolerance
        assert torch.equal(subject.operator.matmat(0 * U[:, :2]), 0 * U[:, :2])

    @pytest.mark.parametrize("column", [0, 5])
    def test_columns_are_products_of_their_own(self, subject: OperatorUnderTest, column: int) -> None:
        """Strided and contiguous ones."""
        strided = subject.U[:, column : column + 1]
        expected = subject.products[:, column : column + 1]
        for v in (strided, strided.clone(memory_format=torch.contiguous_format)):
            assert relative_error(subject.operator.matmat(v), expected) < min(subject.tolerance, 1e-5)

    def test_the_same_answer_twice_and_built_again(self, subject: OperatorUnderTest) -> None:
        """Also where the caller has written into the first one, which is the caller's."""
        operator, U = subject.operator, subject.U[:, :2].clone()
        kept = U.clone()
        first = operator.matmat(U)
        expected = first.clone()
        first.zero_()
        assert torch.equal(operator.matmat(U), expected)
        assert torch.equal(subject.build().matmat(U), expected)
        assert torch.equal(U, kept)

    def test_what_is_called_positive_is(self, subject: OperatorUnderTest) -> None:
        forms = (subject.U * subject.products).sum(0)
        assert not subject.operator.is_psd or (forms >= -subject.tolerance * forms.abs().max()).all()

    def test_its_self_check_passes_with_the_same_numbers_twice(self, subject: OperatorUnderTest) -> None:
        checked = self_check(subject.operator, 0)
        assert 0 <= checked.error < 10 * subject.tolerance
        assert checked.num_matvecs >= 0
        assert self_check(subject.operator, 0) == checked

    def test_its_own_eigenpairs_are_a_matrix_of_eigenvectors(self, subject: OperatorUnderTest) -> None:
        operator = subject.operator
        pairs = eigenpairs(operator, LanczosOptions(k=1, tol=1e-2, max_matvecs=40, return_eigenvectors=True))
        v = pairs.eigenvectors
        assert v is not None
        assert v.shape == (operator.shape[0], 1)
        assert (operator.matmat(v) - v * pairs.eigenvalues.to(v)).norm() <= 2 * pairs.residuals[0] + subject.tolerance
        assert v.double().norm().item() == pytest.approx(1, abs=1e-6)

    def test_nothing_is_touched(self, subject: OperatorUnderTest) -> None:
        parameters = list(subject.problem.model.parameters())
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 3.0)
        before = traces(subject.problem)
        subject.build().matmat(subject.U[:, :2])
        after = traces(subject.problem)
        for parameter in parameters:
            parameter.grad = None
        assert [name for name in before if not same(after[name], before[name])] == []
