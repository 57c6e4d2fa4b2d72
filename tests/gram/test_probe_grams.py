"""`problem.grams`: what is computed once for all who ask, and what a user's measurement may ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from curvature_callbacks import CurvatureMonitor, Problem, Record
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.problem.memory import ProbeMemory
from tests.cases import CASES
from tests.reference import sample_gradients

SAMPLED = FisherType(fisher="sampled")


@contextmanager
def counted_problem(**options: Any) -> Iterator[tuple[Problem, list[int]]]:
    """A problem of one microbatch whose layout is proved, and a list that gets an entry a forward pass."""
    model, microbatches = CASES["mlp"].model(), CASES["mlp"].microbatches((4,))
    calls: list[int] = []
    memory = ProbeMemory()
    with isolated(model, seed=0):
        Problem(model, microbatches, loss="cross_entropy", memory=memory).grams()
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        yield Problem(model, microbatches, loss="cross_entropy", memory=memory, **options), calls


def test_the_same_grams_are_computed_once():
    with counted_problem() as (problem, calls):
        assert problem.grams() is problem.grams(EMPIRICAL) is problem.grams(memory_budget=1)
        assert len(calls) == 1
        assert problem.grams(SAMPLED) is not problem.grams()
        assert problem.grams(max_params_per_block=8) is not problem.grams()
        assert len(calls) == 3


def test_deterministic_algorithms_have_grams_of_their_own():
    with counted_problem() as (problem, _):
        usual = problem.grams()
        torch.use_deterministic_algorithms(True)
        try:
            assert problem.grams() is not usual
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("announced", "passes"), [({EMPIRICAL: "expand"}, 1), ({}, 2), ({EMPIRICAL: "reduce"}, 2)], ids=str)
def test_factors_that_are_announced_come_with_the_grams(announced: dict[FisherType, Any], passes: int):
    with counted_problem(sharing=announced) as (problem, calls):
        problem.grams()
        layers = problem.grams.kronecker(EMPIRICAL, sharing="expand")
        assert list(layers) == [name for name in problem.objective.parameters if name in layers] != []
        assert problem.grams.kronecker(EMPIRICAL, sharing="expand") is layers
        assert len(calls) == passes


def test_a_part_of_each_block_has_no_factors():
    with counted_problem(sharing={EMPIRICAL: "expand"}) as (problem, calls):
        assert problem.grams(max_params_per_block=8).kronecker == {}
        assert len(calls) == 1


def test_operations_cost_a_pass_only_where_there_are_no_grams():
    with counted_problem() as (problem, calls):
        seen = problem.grams.operations
        assert len(calls) == 1
        assert problem.grams.operations is seen
    with counted_problem() as (problem, calls):
        problem.grams()
        assert problem.grams.operations == seen
        assert len(calls) == 1


class LargestGradient:
    """A measurement of a user: the norm of the longest gradient."""

    name = "largest_gradient"

    def init(self, problem: Problem) -> None:
        return None

    def measure(self, problem: Problem, state: None) -> tuple[list[Record], None]:
        total = sum(problem.grams(SAMPLED if problem.step else FisherType()).grams.values())
        norm = float(total.diagonal().max().sqrt())
        return [Record(step=problem.step, measurement=self.name, scalars={"norm": norm})], None


def test_a_users_measurement_asks_for_grams():
    model: nn.Module = CASES["mlp"].model()
    (batch,) = CASES["mlp"].microbatches((4,))
    monitor = CurvatureMonitor(model, probes=[batch], loss="cross_entropy", measure=[LargestGradient()], when=1)
    record = next(record for record in monitor.step(0) if record.measurement == "largest_gradient")
    G = torch.cat(list(sample_gradients(model, [batch], "pair").values()), 1)
    assert record.scalars["norm"] == pytest.approx(float(G.norm(dim=1).max()))
