"""Which of ascending eigenvalues are wanted."""

import pytest
import torch

from curvature_callbacks.linalg.lanczos.wanted import Wanted, wanted
from tests.linalg.lanczos.lanczos_cases import ENDS, wanted_values


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_chosen_values_are_those_scipy_names_descending(k: int, which: str):
    values = torch.tensor([-9.0, -4.0, -1.0, 0.5, 2.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    chosen = wanted(k, which).choose(values)  # type: ignore[arg-type]
    assert torch.equal(values[chosen], wanted_values(values, k, which))


def test_the_odd_one_of_both_ends_is_on_top():
    assert wanted(5, "BE") == Wanted(3, 2)
    assert wanted(1, "BE") == Wanted(1, 0)


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("n", range(8))
def test_no_more_than_there_are(n: int, which: str):
    fitting = wanted(5, which).at_most(n)  # type: ignore[arg-type]
    assert fitting.count == min(n, 5)
    assert len(set(fitting.choose(torch.arange(float(n))).tolist())) == min(n, 5)
    if which == "BE" and n < 5:
        assert abs(fitting.upper - fitting.lower) <= 1


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_more_keeps_the_ends(count: int, which: str):
    before, after = wanted(4, which), wanted(4, which).more(count)  # type: ignore[arg-type]
    assert after.count == 4 + count
    assert (after.upper > 0, after.lower > 0) == (before.upper > 0, before.lower > 0)
    assert abs((after.upper - before.upper) - (after.lower - before.lower)) <= 1 or which != "BE"
