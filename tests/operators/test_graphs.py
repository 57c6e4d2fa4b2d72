"""Kept and rebuilt graphs give the same products, and their measured sizes are what the budget is held against."""

import gc
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from curvature_callbacks import RefusedError
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator, SampledFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.graphs import GraphLimits, KeptGraphs, MicrobatchOperator, held_bytes
from curvature_callbacks.operators.hessian import HessianOperator
from curvature_callbacks.problem.problem import Problem
from tests.cases import CASES

OPERATORS = (HessianOperator, GGNOperator, EmpiricalFisherOperator, SampledFisherOperator)


def problem_of(name: str) -> Any:
    case = CASES[name]
    return offline_problem(case.model(), case.microbatches(), loss=case.loss, params_filter=None)


def operator_of(cls: type, problem: Problem, *, budget: int | None = None) -> Any:
    """The operator, whose graphs may take `budget` bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicrobatchOperator, "limits", GraphLimits(kept_bytes=budget))
        return cls(problem.objective, problem.microbatches)


def vectors(size: int, K: int = 2) -> Tensor:
    return torch.randn(size, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def passes_of_a_product(operator: Any, problem: Problem) -> int:
    """Forward passes: of the microbatches whose graph is not kept."""
    calls: list[int] = []
    with problem.model.register_forward_hook(lambda *_: calls.append(1)):
        operator.matmat(vectors(operator.shape[0]))
    return len(calls)


def budget_that_keeps_some(cls: type, problem: Problem) -> int:
    """By bisection between one that keeps every graph and one that keeps none."""
    none, every = 0, 1 << 20
    while every - none > 1:
        budget = (none + every) // 2
        passes = passes_of_a_product(operator_of(cls, problem, budget=budget), problem)
        if 0 < passes < len(problem.microbatches):
            return budget
        none, every = (none, budget) if passes == 0 else (budget, every)
    raise AssertionError("all graphs are kept, or none")


@pytest.mark.parametrize(
    ("name", "cls"),
    [*((name, cls) for name in ("gpt2", "mlp") for cls in OPERATORS), ("resnet", OPERATORS[0]), ("mixtral", OPERATORS[-1])],
)
def test_rebuilt_graphs_give_the_bits_of_kept_ones(name: str, cls: type):
    with problem_of(name) as problem:
        kept, none = operator_of(cls, problem), operator_of(cls, problem, budget=0)
        V = vectors(kept.shape[0])
        expected = kept.matmat(V)
        assert len(problem.microbatches) == 3
        assert [passes_of_a_product(operator, problem) for operator in (kept, none)] == [0, 3]
        assert torch.equal(none.matmat(V), expected)
        assert torch.equal(none.matmat(V), expected)


@pytest.mark.parametrize("cls", OPERATORS)
def test_some_kept_and_some_rebuilt_give_the_same_bits(cls: type):
    with problem_of("mlp") as problem:
        some = operator_of(cls, problem, budget=budget_that_keeps_some(cls, problem))
        V = vectors(some.shape[0])
        assert torch.equal(some.matmat(V), operator_of(cls, problem).matmat(V))


@pytest.mark.parametrize("budget", [None, 0])
def test_self_checks_pass_either_way(budget: int | None):
    with problem_of("mlp") as problem:
        for cls in OPERATORS:
            assert operator_of(cls, problem, budget=budget).self_check(0).error < 1e-10


@pytest.mark.parametrize("cls", OPERATORS)
def test_kept_graphs_take_no_pass_and_rebuilt_ones_one_for_all_columns(cls: type):
    with problem_of("mlp") as problem:
        for budget, expected in ((None, 0), (0, 3)):
            calls: list[int] = []
            with problem.model.register_forward_hook(lambda *_, calls=calls: calls.append(1)):
                operator = operator_of(cls, problem, budget=budget)
            assert len(calls) == 3
            assert passes_of_a_product(operator, problem) == expected


class Given:
    """A graph of a size that is told."""

    alive = 0

    def __init__(self, size: int) -> None:
        self.held = torch.zeros(size, dtype=torch.uint8)
        Given.alive += 1
        weakref.finalize(self, Given._gone)

    @staticmethod
    def _gone() -> None:
        Given.alive -= 1

    def product(self, parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return list(parts)

    def nodes(self) -> Iterator[Node]:
        return iter(())

    def tensors(self) -> list[Tensor]:
        return [self.held]


@pytest.mark.parametrize(
    ("sizes", "budget", "kept"),
    [
        ((4, 4, 4), 12, 3),
        ((4, 4, 4), 11, 1),  # room for the ones built again
        ((4, 4, 4), 3, 0),
        ((2, 8, 2), 10, 1),
        ((2, 8, 2, 5), 10, 1),
        ((1, 1, 8), 10, 3),
        ((2, 1, 8), 10, 1),
        ((9, 1, 1), 10, 1),
    ],
)
def test_as_many_are_kept_as_leave_room_for_one_that_is_built_again(sizes: tuple[int, ...], budget: int, kept: int):
    built: list[int] = []

    def build(place: int) -> Given:
        built.append(place)
        return Given(sizes[place])

    graphs = KeptGraphs(build, len(sizes), device=torch.device("cpu"), budget=budget)
    assert built == list(range(len(sizes)))
    assert Given.alive == kept
    built.clear()
    most = 0

    def look(graph: Given) -> None:
        nonlocal most
        most = max(most, Given.alive)

    graphs.each(build, look)
    again = [place for place in range(len(sizes)) if place in built]
    assert len(again) == len(sizes) - kept
    held = sum(size for place, size in enumerate(sizes) if place not in again)
    assert held + max((sizes[place] for place in again), default=0) <= max(budget, max(sizes))
    assert most == kept + bool(again)  # each is freed before the next is built


def chain(x: Tensor) -> Tensor:
    return (x.sin().exp() * x).sum()


class ScalarGraph:
    """The graph of a scalar, or of its gradient."""

    def __init__(self, x: Tensor, *, twice: bool) -> None:
        value = chain(x)
        self._edge = get_gradient_edge(torch.autograd.grad(value, x, create_graph=True)[0] if twice else value)

    def product(self, parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return parts

    def nodes(self) -> Iterator[Node]:
        yield self._edge.node

    def tensors(self) -> tuple[Tensor, ...]:
        return ()


def test_bytes_are_those_of_the_distinct_saved_tensors():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    first = ScalarGraph(x, twice=False)
    assert held_bytes(first) == 2 * 8000  # x and the exponential, which two operations saved each
    assert held_bytes(first, known=[x]) == 8000
    assert held_bytes(ScalarGraph(x, twice=True), known=[x]) > held_bytes(first, known=[x])


@pytest.mark.parametrize("cls", OPERATORS)
def test_graphs_go_with_their_operator(cls: type):
    with problem_of("mlp") as problem:
        operator = operator_of(cls, problem)
        operator.matmat(vectors(operator.shape[0]))
        leaves = [weakref.ref(leaf) for leaf in operator._leaves]
        gc.disable()
        try:
            del operator
            assert all(leaf() is None for leaf in leaves)  # by counting references: no cycle waits for the collector
        finally:
            gc.enable()


class Noisy(nn.Module):
    """Draws in its forward pass, in evaluation mode too."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.draw = draw
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * self.draw(x))


def drawing(draw: Callable[[Tensor], Tensor]) -> AbstractContextManager[Problem]:
    case = CASES["mlp"]
    return offline_problem(Noisy(draw).double(), case.microbatches(), loss=case.loss, params_filter=None)


def of_the_system(x: Tensor) -> Tensor:
    """From a generator that has no seed."""
    return torch.tensor([random.SystemRandom().random() for _ in range(4)], dtype=x.dtype)


@pytest.mark.parametrize("cls", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
def test_a_model_that_draws_has_one_draw_where_graphs_are_rebuilt(cls: type):
    with drawing(lambda x: torch.rand(len(x), 4, dtype=x.dtype)) as problem:
        kept, rebuilt = operator_of(cls, problem), operator_of(cls, problem, budget=0)
        rebuilt.self_check(0)
        v = vectors(kept.shape[0])
        assert torch.allclose(rebuilt.matmat(v), kept.matmat(v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
def test_a_model_whose_draws_cannot_be_kept_is_refused_where_graphs_are_rebuilt(cls: type):
    with drawing(of_the_system) as problem, pytest.raises(RefusedError):
        operator_of(cls, problem, budget=0).self_check(0)
