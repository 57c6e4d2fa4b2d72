"""When a run looks at its pairs: at the latest every few steps, and when the worst of them is about to converge."""

import math

import pytest
import torch

from curvature_callbacks.linalg.iteration import LOOK_EVERY, Iteration, Pace
from curvature_callbacks.linalg.lanczos import lanczos
from tests.linalg.lanczos_cases import Counted, outliers_and_bulk, symmetric


def test_the_next_look_is_when_the_residual_will_have_fallen():
    pace = Pace(5)
    assert pace.ahead == 5
    pace.note(10, 1e4)
    assert pace.ahead == 5  # nothing to compare with
    pace.note(15, 1e2)  # a factor of 10 in 2.5 steps: 5 more
    assert pace.ahead == 5
    pace.note(20, 3.0)  # a factor of 2 a step
    assert pace.ahead == 2
    pace.note(22, 1.01)
    assert pace.ahead == 1


@pytest.mark.parametrize("distances", [(2.0, 3.0), (math.inf, 2.0), (2.0, math.inf), (2.0, 2.0), (2.0, 0.5)])
def test_what_does_not_fall_is_looked_at_as_before(distances: tuple[float, float]):
    pace = Pace(5)
    for step, distance in enumerate(distances):
        pace.note(5 * (step + 1), distance)
    assert pace.ahead == 5


def test_a_forecast_is_never_beyond_the_usual_look():
    pace = Pace(3)
    pace.note(5, 1e9)
    pace.note(8, 0.9e9)
    assert pace.ahead == 3


@pytest.mark.parametrize("mode", ["full", "partial", "thick_restart"])
def test_no_more_products_than_by_looks_at_every_step_but_two(mode: str, monkeypatch: pytest.MonkeyPatch):
    """And at most twice as many looks as every five steps."""
    looks = 0
    pairs_of = Iteration._pairs

    def counted(self: Iteration, *, final: bool) -> object:
        nonlocal looks
        looks += 1
        return pairs_of(self, final=final)

    monkeypatch.setattr(Iteration, "_pairs", counted)
    spent = {}
    for seed in range(5):
        operator = Counted(symmetric(outliers_and_bulk(300, seed=seed), seed=seed))
        options = {"k": 10, "which": "BE", "tol": 1e-3, "max_matvecs": 200, "reorth_mode": mode, "seed": seed}
        looks = 0
        ours = lanczos(operator, **options).num_matvecs
        assert looks <= 2 * (ours / LOOK_EVERY + 1)
        with monkeypatch.context() as every:
            every.setattr("curvature_callbacks.linalg.lanczos.LOOK_EVERY", 1)
            spent[seed] = (ours, lanczos(operator, **options).num_matvecs)
    assert all(ours <= least + LOOK_EVERY - 1 for ours, least in spent.values())
    assert sum(ours for ours, _ in spent.values()) <= sum(least + 2 for _, least in spent.values())


def test_a_cold_run_for_one_pair_is_looked_at_every_few_steps():
    pairs = lanczos(Counted(symmetric(torch.linspace(0, 1, 100, dtype=torch.float64))), k=1, tol=1e-2)
    assert pairs.num_matvecs % LOOK_EVERY == 0
