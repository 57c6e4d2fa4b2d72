"""When a run looks at its pairs: every few steps, and more often once the worst of them has nearly converged."""

import pytest
import torch

from curvature_callbacks.linalg.lanczos.limits import DEFAULT_LIMITS, LanczosLimits
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import iteration, lanczos
from tests.linalg.lanczos.lanczos_cases import Counted, outliers_and_bulk, symmetric

LOOK_EVERY = DEFAULT_LIMITS.look_every


@pytest.mark.parametrize("mode", ["full", "partial", "thick_restart"])
def test_no_more_products_than_by_looks_at_every_step_but_two(mode: str):
    """And at most five looks more than every five steps."""
    spent = {}
    for seed in range(5):
        operator = Counted(symmetric(outliers_and_bulk(300, seed=seed), seed=seed))
        options = LanczosOptions(k=10, which="BE", tol=1e-3, max_matvecs=200, reorth_mode=mode, seed=seed)  # type: ignore[arg-type]
        usual, closest = iteration(operator, options), iteration(operator, options, limits=LanczosLimits(look_every=1))
        looks = len(list(usual.looks()))
        assert looks <= usual.krylov.num_matvecs / LOOK_EVERY + 5
        closest.result()
        spent[seed] = (usual.krylov.num_matvecs, closest.krylov.num_matvecs)
    assert all(ours <= least + LOOK_EVERY - 1 for ours, least in spent.values())
    assert sum(ours for ours, _ in spent.values()) <= sum(least + 2 for _, least in spent.values())


def test_the_last_look_is_the_result():
    operator, options = Counted(symmetric(outliers_and_bulk(100))), LanczosOptions(k=4, tol=1e-6)
    *_, last = iteration(operator, options).looks()
    pairs = lanczos(operator, k=4, tol=1e-6)
    assert torch.equal(pairs.eigenvalues, last.values)
    assert torch.equal(pairs.residuals, last.residuals)


def test_a_cold_run_for_one_pair_is_looked_at_every_few_steps():
    pairs = lanczos(Counted(symmetric(torch.linspace(0, 1, 100, dtype=torch.float64))), k=1, tol=1e-2)
    assert pairs.num_matvecs % LOOK_EVERY == 0
