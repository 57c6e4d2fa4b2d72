"""When a run looks at its pairs: every few steps, and more often once the worst of them has nearly converged."""

import pytest
import torch

from curvature_callbacks.linalg.lanczos.iteration import LOOK_EVERY, Iteration
from curvature_callbacks.linalg.lanczos.solver import lanczos
from tests.linalg.lanczos.lanczos_cases import Counted, outliers_and_bulk, symmetric


@pytest.mark.parametrize("mode", ["full", "partial", "thick_restart"])
def test_no_more_products_than_by_looks_at_every_step_but_two(mode: str, monkeypatch: pytest.MonkeyPatch):
    """And at most five looks more than every five steps."""
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
        assert looks <= ours / LOOK_EVERY + 5
        with monkeypatch.context() as every:
            every.setattr("curvature_callbacks.linalg.lanczos.solver.LOOK_EVERY", 1)
            spent[seed] = (ours, lanczos(operator, **options).num_matvecs)
    assert all(ours <= least + LOOK_EVERY - 1 for ours, least in spent.values())
    assert sum(ours for ours, _ in spent.values()) <= sum(least + 2 for _, least in spent.values())


def test_a_cold_run_for_one_pair_is_looked_at_every_few_steps():
    pairs = lanczos(Counted(symmetric(torch.linspace(0, 1, 100, dtype=torch.float64))), k=1, tol=1e-2)
    assert pairs.num_matvecs % LOOK_EVERY == 0
