"""A problem of a run, and one of keywords, are the same; what both get wrong is said alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL
from curvature_callbacks.problem.deadline import Deadline
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.occasion import Occasion
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.problem.subject import Subject
from curvature_callbacks.processes.world import SINGLE


def of_keywords(
    model: nn.Module, microbatches: list[Any], *, seed: int, step: int, deadline: Deadline, **options: Any
) -> Problem:
    return Problem(
        model, microbatches, sharing={EMPIRICAL: "reduce"}, seed=seed, step=step, world=SINGLE, deadline=deadline, **options
    )


def of_run(model: nn.Module, microbatches: list[Any], *, seed: int, step: int, deadline: Deadline, **options: Any) -> Problem:
    occasion = Occasion(seed=seed, step=step, world=SINGLE, deadline=deadline)
    return Problem.of(Subject(model=model, **options), microbatches, occasion, {EMPIRICAL: "reduce"})


@pytest.mark.parametrize("build", [of_keywords, of_run])
def test_every_option_arrives(build: Callable[..., Problem]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    microbatches = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (2, 3)]
    optimizer, memory, deadline = torch.optim.SGD(model.parameters(), lr=0.5), ProbeMemory(), Deadline.after(1e6)
    with isolated(model, seed=0):
        problem = build(
            model,
            microbatches,
            loss="cross_entropy",
            params_filter=lambda name, _: name != "0.bias",
            block_structure="parameter",
            optimizer=optimizer,
            memory=memory,
            seed=5,
            step=7,
            deadline=deadline,
        )
        problem.check()
        found, grams = problem.gradients, problem.grams()
    assert (problem.model, problem.seed, problem.step, problem.world) == (model, 5, 7, SINGLE)
    assert problem.deadline is deadline
    assert problem.num_rows == 5
    assert problem.stability().limit == pytest.approx(2 / 0.5)
    assert memory.blocks == (("0.weight", "2.weight", "2.bias"), problem.blocks)
    assert problem.blocks == {name: (name,) for name in ("0.weight", "2.weight", "2.bias")}
    assert memory.grams.certified, "what was proved is told to the run"
    assert set(grams.kronecker) == {"0.weight", "2.weight"}, "announced factors come with the Grams"
    x, y = (torch.cat(parts) for parts in zip(*microbatches, strict=True))
    truth = torch.autograd.grad(F.cross_entropy(model(x), y), [dict(model.named_parameters())[name] for name in found])
    assert list(found) == list(problem.blocks)
    for gradient, expected in zip(found.values(), truth, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("build", [of_keywords, of_run])
def test_no_microbatch_is_no_problem(build: Callable[..., Problem]):
    options: dict[str, Any] = dict.fromkeys(("loss", "params_filter", "optimizer"))
    with pytest.raises(ConfigurationError, match="at least one microbatch"):
        build(
            nn.Linear(4, 3),
            [],
            **options,
            block_structure="layer",
            memory=ProbeMemory(),
            seed=0,
            step=0,
            deadline=Deadline(),
        )
