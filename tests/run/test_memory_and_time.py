"""Probes whose memory or time runs out: the same rows in smaller microbatches, and what is left for the next probe."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from curvature_callbacks import EveryNSteps, LossSpike, Record
from curvature_callbacks.processes.world import SINGLE
from curvature_callbacks.run.pace import Pace
from tests.run.monitor_cases import example_batch, new_monitor
from tests.training_cases import reports

MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
]

TRIES: list[int] = []  # largest microbatch of each


@dataclass(frozen=True)
class Fitting:
    """The mean loss, of microbatches of at most `most` rows."""

    most: int
    error: Exception
    name: str = "fitting"

    def init(self, problem: Any) -> None:
        return None

    def measure(self, problem: Any, state: None) -> Any:
        sizes = [microbatch.num_rows for microbatch in problem.microbatches]
        TRIES.append(max(sizes))
        if max(sizes) > self.most:
            raise self.error
        norm = float(sum(value.square().sum() for value in problem.gradients.values()))
        scalars = {"norm": norm, "rows": float(sum(sizes)), "most": float(max(sizes))}
        return [Record(step=problem.step, measurement=self.name, scalars=scalars)], None


def of(records: list[Record], name: str) -> Record:
    return next(record for record in records if record.measurement == name)


@pytest.mark.parametrize("error", MEMORY, ids=["device", "host"])
def test_memory_that_runs_out_is_met_with_smaller_microbatches_of_the_same_rows(error: Exception, caplog: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    watching = new_monitor(model, probes=[example_batch(12), example_batch(5)], measure=[Fitting(most=4, error=error)])
    whole = new_monitor(model, probes=[example_batch(12), example_batch(5)], measure=[Fitting(most=12, error=error)])
    found, expected = of(watching.step(0), "fitting"), of(whole.step(0), "fitting")
    assert found.error is None
    assert found.scalars["rows"] == 17
    assert found.scalars["most"] == 3
    assert found.scalars["norm"] == pytest.approx(expected.scalars["norm"], rel=1e-5)
    assert of(watching.history, "probe").scalars["microbatch_size"] == 3
    TRIES.clear()
    again = of(watching.step(1), "probe")
    assert TRIES == [3]
    assert again.scalars["microbatch_size"] == 3
    assert again.scalars["failed"] == 0
    assert len(reports(caplog)) == 1


def test_a_single_row_that_does_not_fit_is_a_failure(caplog: Any) -> None:
    watching = new_monitor(measure=[Fitting(most=0, error=MEMORY[0])])
    records = watching.step(0)
    assert of(records, "fitting").error is not None
    assert of(records, "probe").scalars["microbatch_size"] == 1


def test_another_error_is_not_tried_again() -> None:
    records = new_monitor(measure=[Fitting(most=1, error=RuntimeError("kernel"))]).step(0)
    assert of(records, "fitting").error == "RuntimeError: kernel"
    assert of(records, "probe").scalars["microbatch_size"] == 6


@dataclass(frozen=True)
class Named:
    """Costs nothing."""

    name: str

    def init(self, problem: Any) -> None:
        return None

    def measure(self, problem: Any, state: None) -> Any:
        return [Record(step=problem.step, measurement=self.name, scalars={"one": 1.0})], None


def test_what_there_is_no_time_for_comes_first_at_the_next_probe() -> None:
    watching = new_monitor(measure=[Named("a"), Named("b"), Named("c")], max_seconds=1e-9)
    measured = []
    for step in range(4):
        records = watching.step(step)
        measured.append([record.measurement for record in records if record.measurement != "probe"])
        assert of(records, "probe").scalars["skipped"] == 2
        assert of(records, "probe").scalars["failed"] == 0
    assert measured[0] == ["a"]
    assert {name for names in measured[:3] for name in names} == {"a", "b", "c"}


def test_nothing_is_left_out_in_time_enough() -> None:
    records = new_monitor(measure=[Named("a"), Named("b")], max_seconds=1000).step(0)
    assert of(records, "probe").scalars["skipped"] == 0


def test_a_probe_that_waits_and_the_losses_looked_back_at_go_on_after_a_checkpoint() -> None:
    saved = {"previous": 3, "put_off": 7, "last_spike": 4, "losses": [1.0, 2.0]}
    first, second = (Pace(EveryNSteps(n=5), spike=LossSpike(window=3)) for _ in range(2))
    first.load(saved)
    second.load(json.loads(json.dumps(first.state())))
    assert {name: second.state()[name] for name in saved} == saved
    assert [second.advance(step, None, SINGLE) for step in range(4, 8)] == [None, None, None, "schedule"]
