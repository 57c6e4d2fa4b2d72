"""When a probe is due: never twice for a multiple, never missed by a loop that jumps over one."""

import itertools
import math

import pytest

from curvature_callbacks import AtSteps, ConfigurationError, EveryNSteps, LogSpaced, Schedule


def due(schedule: Schedule, steps: list[int]) -> list[int]:
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


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", [AtSteps(steps=[0, 5, 6, 20, 41]), AtSteps(steps=(41, 5))], ids=["listed", "unordered"])
def test_each_listed_step_is_met_or_crossed_exactly_once(schedule: AtSteps, stride: int) -> None:
    steps = [step for step in range(0, 70, stride) for _ in range(2)]
    assert due(schedule, steps) == sorted({-(-listed // stride) * stride for listed in schedule.steps})


def test_log_spaced_steps_are_those_of_the_formula() -> None:
    for per_decade, first in [(1, 1), (3, 1), (4, 10), (7, 3)]:
        marks = [first * 10 ** (i / per_decade) for i in range(4 * per_decade + 1)]
        expected = sorted({0, *(math.ceil(mark - 1e-6) for mark in marks if mark <= 2000)})
        assert due(LogSpaced(per_decade=per_decade, first=first), list(range(2001))) == [s for s in expected if s <= 2000]


@pytest.mark.parametrize("stride", [2, 3, 50])
def test_no_log_spaced_step_is_missed_or_measured_twice(stride: int) -> None:
    schedule = LogSpaced(per_decade=5, first=10)
    single = due(schedule, list(range(3001)))
    calls = [step for step in range(0, 3001, stride) for _ in range(2)]
    assert due(schedule, calls) == sorted({-(-step // stride) * stride for step in single} & set(calls))


def test_powers_of_ten_are_met_exactly() -> None:
    schedule = LogSpaced(per_decade=1, first=1)
    assert all(schedule.due(10**i, 10**i - 1) and not schedule.due(10**i + 1, 10**i) for i in range(1, 12))


@pytest.mark.parametrize("steps", [[], [-1], [1.0], [True], "12", 3, None])
def test_bad_steps_are_refused(steps: object) -> None:
    with pytest.raises(ConfigurationError, match=r"`steps` must list integers of at least 0, got"):
        AtSteps(steps=steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"per_decade": 0}, {"first": 0}, {"first": 1.5}])
def test_bad_spacings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="must be an integer of at least 1"):
        LogSpaced(**bad)  # type: ignore[arg-type]
