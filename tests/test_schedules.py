"""When a probe is due: never twice for a multiple, never missed by a loop that jumps over one."""

import itertools

import pytest

from curvature_callbacks import ConfigurationError, EveryNSteps, Schedule


def due(schedule: EveryNSteps, steps: list[int]) -> list[int]:
    """The steps at which a loop calling at `steps` probes."""
    calls = zip([None, *steps], steps, strict=False)
    return [step for previous, step in calls if schedule.due(step, previous)]


def test_every_multiple_of_a_loop_that_counts_by_one() -> None:
    assert due(EveryNSteps(n=3), list(range(10))) == [0, 3, 6, 9]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("repeats", [1, 3], ids=["once", "accumulated"])
def test_each_multiple_is_met_or_crossed_exactly_once(n: int, stride: int, repeats: int) -> None:
    steps = [step for step in range(0, 60, stride) for _ in range(repeats)]
    found = due(EveryNSteps(n=n), steps)
    multiples = {step // n for step in steps}
    assert [step // n for step in found] == sorted(multiples)
    assert all(step - stride < (step // n) * n <= step for step in found)


def test_the_first_call_always_measures() -> None:
    assert EveryNSteps(n=100).due(37, None)


def test_no_step_is_due_twice() -> None:
    schedule = EveryNSteps(n=4)
    assert not any(schedule.due(step, step) for step in range(20))


def test_going_back_is_not_a_crossing() -> None:
    assert not any(EveryNSteps(n=4).due(step, previous) for step, previous in itertools.combinations(range(12), 2))


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", True, None])
def test_a_bad_interval_is_refused(n: object) -> None:
    with pytest.raises(ConfigurationError, match=r"`every_n_steps` must be an integer of at least 1, got"):
        EveryNSteps(n=n)  # type: ignore[arg-type]


def test_it_is_a_schedule() -> None:
    assert isinstance(EveryNSteps(n=1), Schedule)
