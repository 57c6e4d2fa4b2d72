"""Budget and spikes, on a clock of our own, so that nothing here depends on the machine."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from curvature_callbacks import AtSteps, ConfigurationError, EveryNSteps, LossSpike
from curvature_callbacks.processes.world import SINGLE
from curvature_callbacks.run import monitor
from curvature_callbacks.run.pace import Pace
from tests.run.monitor_cases import new_monitor

Cost = Callable[[int], float]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drive(timing: Pace, clock: Clock, steps: range, *, training: Cost, probe: Cost) -> tuple[list[int], float]:
    """Probed steps, and the seconds spent on them."""
    probed, spent = [], 0.0
    for step in steps:
        if timing.advance(step, None, SINGLE) is not None:
            clock.now += probe(step)
            spent += probe(step)
            timing.probed(step)
            timing.spent(probe(step))
            probed.append(step)
        clock.now += training(step)
    return probed, spent


RUNS: dict[str, tuple[Cost, Cost]] = {
    "cheap": (lambda step: 0.1, lambda step: 0.5),
    "dear": (lambda step: 0.1, lambda step: 20.0),
    "dearer and dearer": (lambda step: 0.1, lambda step: 1.0 + step / 2000),
    "cheaper": (lambda step: 0.1, lambda step: 3.0 - step / 5000),
    "slow start": (lambda step: 5.0 if step < 3 else 0.1, lambda step: 10.0 if step == 0 else 2.0),
    "slower": (lambda step: 0.05 if step < 5000 else 0.2, lambda step: 2.0),
    "faster": (lambda step: 0.2 if step < 5000 else 0.05, lambda step: 2.0),
    "alternating": (lambda step: 0.1, lambda step: 1.0 + step % 2),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_share_is_held_within_a_fifth(name: str, n: int, share: float) -> None:
    clock = Clock()
    training, probe = RUNS[name]
    timing = Pace(EveryNSteps(n=n), max_overhead=share, clock=clock)
    probed, spent = drive(timing, clock, range(10_000), training=training, probe=probe)
    assert spent / (clock.now - 100) == pytest.approx(share, rel=0.2)
    assert timing.overhead(0.0) == pytest.approx(spent / (clock.now - 100), abs=1e-3)
    assert probed[0] == 0


def test_what_the_budget_has_room_for_keeps_its_schedule() -> None:
    clock = Clock()
    timing = Pace(EveryNSteps(n=10), max_overhead=0.2, clock=clock)
    probed, _ = drive(timing, clock, range(200), training=lambda step: 1.0, probe=lambda step: 1.0)
    assert probed == list(range(0, 200, 10))


def test_a_budget_goes_on_after_a_checkpoint() -> None:
    costs: dict[str, Cost] = {"training": lambda step: 0.1, "probe": lambda step: 2.0}
    clock = Clock()
    whole, _ = drive(Pace(EveryNSteps(n=7), max_overhead=0.1, clock=clock), clock, range(2000), **costs)
    first, second = (Pace(EveryNSteps(n=7), max_overhead=0.1, clock=clock) for _ in range(2))
    before, _ = drive(first, clock, range(1000), **costs)
    second.load(json.loads(json.dumps(first.state())))
    clock.now += 1000  # between two runs
    after, _ = drive(second, clock, range(1000, 2000), **costs)
    found = before + after
    assert len(found) == pytest.approx(len(whole), abs=1)
    assert all(abs(one - other) <= 7 for one, other in zip(found, whole, strict=False))


class Averaging:
    """A world that notes what it is asked to average."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.asked: list[float] = []

    def average(self, number: float) -> float:
        self.asked.append(number)
        return number

    def gathered(self, item: float | None) -> list[float | None]:
        """As if the other process had a loss that is larger by two, or had none."""
        self.asked.append(-1.0 if item is None else item)
        return [item, None if item is None else item + 2.0]


def test_clocks_of_processes_are_asked_at_candidates_only() -> None:
    world, clock = Averaging(), Clock()
    timing = Pace(EveryNSteps(n=50), max_overhead=0.1, clock=clock)
    probed = 0
    for step in range(2000):
        if timing.advance(step, None, world) is not None:  # type: ignore[arg-type]
            clock.now += 30.0
            timing.probed(step)
            timing.spent(30.0)
            probed += 1
        clock.now += 0.1
    assert probed >= 1
    assert len(world.asked) <= 3 * (2000 // 50 + probed)


def test_the_monitor_says_what_share_it_took(monkeypatch: Any) -> None:
    clock = Clock()
    monkeypatch.setattr(monitor, "Pace", partial(Pace, clock=clock))
    watching = new_monitor(max_overhead=0.5)
    shares = {}
    for step in range(40):
        for record in watching.step(step):
            if record.measurement == "probe":
                shares[step] = record.scalars["overhead"]
                assert record.metadata["trigger"] == "schedule"
        clock.now += 1.0
    assert all(0 < share <= 1 for share in shares.values())
    assert json.loads(json.dumps(watching.state_dict(tensors=False)))["training"] > 0


def test_a_real_run_reports_a_share_between_none_and_all() -> None:
    watching = new_monitor(max_overhead=0.5)
    records = [record for step in range(30) for record in watching.step(step) if record.measurement == "probe"]
    assert all(0 < record.scalars["overhead"] <= 1 for record in records)


def spiked(losses: list[Any], **changes: Any) -> list[int]:
    """Steps probed for a spike of a run with these losses."""
    spike = LossSpike(**({"num_std": 3.0, "window": 4, "cooldown": 5} | changes))
    timing = Pace(AtSteps(steps=[0]), spike=spike, clock=Clock())
    found = []
    for step, loss in enumerate(losses):
        trigger = timing.advance(step, loss, SINGLE)
        if trigger is not None:
            timing.probed(step)
        if trigger == "spike":
            found.append(step)
    return found


CALM = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95]


def test_a_loss_far_above_those_before_is_a_spike() -> None:
    assert spiked([*CALM, 1.1, 9.0, 1.0]) == [7]
    assert spiked([*CALM, -9.0]) == []


def test_the_threshold_is_that_of_the_window() -> None:
    window = [1.0, 3.0, 1.0, 3.0]  # mean 2, deviation 1
    assert spiked([9.0, *window, 4.99], num_std=3.0) == []
    assert spiked([9.0, *window, 5.01], num_std=3.0) == [5]


def test_no_spike_before_the_window_is_full() -> None:
    assert spiked([1.0, 1.0, 1.0, 50.0]) == []


def test_at_most_one_in_the_cooldown() -> None:
    assert spiked([*CALM, *[math.nan] * 12], cooldown=5) == [6, 11, 16]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_spike_and_not_in_the_window(loss: float) -> None:
    assert spiked([*CALM, loss]) == [6]
    assert spiked([1.0, loss]) == [1]
    assert spiked([*CALM, loss, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]) == [6, 13]


@pytest.mark.parametrize("loss", [torch.ones(2), "a word", object(), 1 << 5000], ids=["two", "word", "object", "too large"])
def test_what_is_not_one_number_is_no_loss(loss: Any) -> None:
    assert spiked([*CALM, loss, 9.0]) == [7]
    world = Averaging()
    Pace(AtSteps(steps=[0]), spike=LossSpike(), clock=Clock()).advance(0, loss, world)  # type: ignore[arg-type]
    assert world.asked == [-1.0], "other processes have not to wait for it"


def test_the_loss_is_that_of_all_processes() -> None:
    world = Averaging()
    timing = Pace(AtSteps(steps=[0]), spike=LossSpike(window=2), clock=Clock())
    for step in range(5):
        timing.advance(step, float(step), world)  # type: ignore[arg-type]
    timing.advance(5, None, world)  # type: ignore[arg-type]
    assert world.asked == [0.0, 1.0, 2.0, 3.0, 4.0, -1.0], "every process takes part, with a loss or without"
    assert list(timing._losses) == [4.0, 5.0]


def test_a_spike_inside_an_accumulation_window_waits_for_its_end() -> None:
    timing = Pace(AtSteps(steps=[0]), spike=LossSpike(window=2), clock=Clock())
    assert timing.advance(0, 1.0, SINGLE) == "schedule"
    timing.probed(0)
    assert timing.advance(0, math.nan, SINGLE) is None
    assert timing.advance(0, 1.0, SINGLE) is None
    assert timing.advance(1, 1.0, SINGLE) == "spike"


def test_a_spike_is_probed_between_those_due_and_said_in_the_record() -> None:
    watching = new_monitor(when=100, spike=LossSpike(window=3, cooldown=4))
    for step, loss in enumerate([1.0, 1.1, 0.9, 1.0, 30.0, 1.0]):
        watching.step(step, loss)
    told = [(record.step, record.metadata["trigger"]) for record in watching.history if record.measurement == "probe"]
    assert told == [(0, "schedule"), (4, "spike")]


def test_a_spike_does_not_wait_for_the_budget_and_the_next_ones_make_up_for_it() -> None:
    clock = Clock()
    timing = Pace(EveryNSteps(n=1), max_overhead=0.1, spike=LossSpike(window=2, cooldown=1), clock=clock)
    probed = []
    for step in range(60):
        trigger = timing.advance(step, math.nan if step == 3 else 1.0, SINGLE)
        if trigger is not None:
            probed.append((step, trigger))
            clock.now += 1.0
            timing.probed(step)
            timing.spent(1.0)
        clock.now += 1.0
    assert probed[:2] == [(0, "schedule"), (3, "spike")]
    assert probed[2][0] >= 20


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, "a", True, math.nan])
def test_a_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(ConfigurationError, match="`max_overhead` must be a share of wall time between 0 and 1"):
        new_monitor(max_overhead=share)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_std": 0}, "num_std"),
        ({"num_std": math.nan}, "num_std"),
        ({"num_std": "4"}, "num_std"),
        ({"window": 1}, "window"),
        ({"window": 2.0}, "window"),
        ({"cooldown": 0}, "cooldown"),
    ],
)
def test_a_bad_spike_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        LossSpike(**changes)
