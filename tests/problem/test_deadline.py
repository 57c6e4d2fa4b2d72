"""What is left of a probe's time."""

import time

import pytest

from curvature_callbacks.problem.deadline import NO_DEADLINE, Deadline


def test_without_a_deadline_only_the_limit_of_the_measurement_counts():
    assert NO_DEADLINE.seconds_left() is None
    assert NO_DEADLINE.seconds_left(3.0) == 3.0
    assert not NO_DEADLINE.has_passed
    assert Deadline.after(None) == NO_DEADLINE


def test_the_shorter_of_both_limits_counts():
    deadline = Deadline.after(100.0)
    assert deadline.seconds_left() == pytest.approx(100.0, abs=5.0)
    assert deadline.seconds_left(3.0) == 3.0
    assert deadline.seconds_left(1000.0) == pytest.approx(100.0, abs=5.0)
    assert not deadline.has_passed


def test_what_begins_after_the_deadline_gets_as_good_as_nothing_but_something():
    deadline = Deadline(time.perf_counter() - 1.0)
    assert deadline.has_passed
    assert deadline.seconds_left() == deadline.seconds_left(3.0) == 1e-3
    assert deadline.seconds_left(1e-9) == 1e-9
