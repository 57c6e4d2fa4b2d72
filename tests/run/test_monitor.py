"""CurvatureMonitor by itself: when it probes, what it draws, what it swallows and what it hands on."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from curvature_callbacks import (
    CapturedProbes,
    JSONLinesSink,
    KFACCoverage,
    MemorySink,
    ProbeError,
    Probes,
    Record,
    RefusedError,
)
from tests.run.monitor_cases import example_batch, new_monitor, outcomes
from tests.training_cases import Checksum, Raising, Rows, assert_equal, cheap, loader, probed_steps, reports


def test_probes_happen_when_due_and_step_returns_their_records() -> None:
    watching = new_monitor(when=3)
    returned = [watching.step(step) for step in range(8)]
    assert [step for step, records in enumerate(returned) if records] == [0, 3, 6]
    assert [record for records in returned for record in records] == watching.history
    assert [record.measurement for record in returned[3]] == ["probe", "checksum"]


def test_a_schedule_of_ones_own() -> None:
    class AtPowersOfTwo:
        def due(self, step: int, previous: int | None) -> bool:
            return step & (step - 1) == 0

    watching = new_monitor(when=AtPowersOfTwo())
    for step in range(20):
        watching.step(step)
    assert probed_steps(watching.history) == [0, 1, 2, 4, 8, 16]


def test_records_carry_the_step_of_the_loggers() -> None:
    watching = new_monitor(when=2)
    watching.step(0, logged_as=0)
    watching.step(4, logged_as=2)
    assert [record.step for record in watching.history] == [0, 0, 2, 2]


class Seeds(Probes):
    """Notes the seeds it is asked for."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def draw(self, seed: int) -> Sequence[Any]:
        self.seeds.append(seed)
        return [example_batch()]


def test_fresh_draws_differ_from_step_to_step_and_fixed_ones_do_not() -> None:
    drawn = {}
    for draw in ("fresh", "fixed"):
        probes = Seeds()
        watching = new_monitor(probes=probes, draw=draw)
        for step in range(3):
            watching.step(step)
        drawn[draw] = probes.seeds[1:]  # the first is of the check
    assert len(set(drawn["fresh"])) == 3
    assert len(set(drawn["fixed"])) == 1


def test_the_seed_changes_the_draws() -> None:
    seeds = []
    for seed in (0, 1):
        probes = Seeds()
        new_monitor(probes=probes, seed=seed).step(0)
        seeds.append(probes.seeds)
    assert seeds[0] != seeds[1]


def test_two_monitors_of_one_model_find_the_same_numbers() -> None:
    model = nn.Linear(6, 3)
    found = []
    for _ in range(2):
        watching = new_monitor(model, probes=loader(), measure=cheap(), num_microbatches=2, microbatch_size=3)
        torch.rand(5)  # the state of the generators does not matter
        watching.step(4)
        found.append([(dict(r.scalars), dict(r.arrays)) for r in watching.history if r.measurement != "probe"])
    assert_equal(found[0], found[1])


def test_nothing_happens_before_a_stream_has_brought_data() -> None:
    captured = CapturedProbes(num_microbatches=1, microbatch_size=3)
    watching = new_monitor(probes=captured, when=10)
    assert watching.step(0) == []
    captured.offer(example_batch())
    assert {record.step for record in watching.step(1)} == {1}
    assert watching.step(2) == []


def test_the_probe_tells_about_itself() -> None:
    watching = new_monitor(probes=[example_batch(6), example_batch(4)], measure=[*cheap(), Raising(error=RuntimeError("x"))])
    summary = watching.step(0)[0]
    hessian = next(record for record in watching.history if record.measurement == "hessian")
    assert summary.scalars["rows"] == 10
    assert summary.scalars["failed"] == 1
    assert summary.scalars["matvecs"] == hessian.num_matvecs
    assert summary.scalars["gradient_equivalents"] > 0
    assert summary.scalars["probe_seconds"] >= hessian.seconds > 0
    assert summary.metadata["blocks"] == ["weight", "bias"] or summary.metadata["blocks"]


def test_metadata_is_json_able() -> None:
    watching = new_monitor(measure=cheap())
    watching.step(0)
    assert [Record.from_json(record.to_json()).to_json() for record in watching.history] == [
        record.to_json() for record in watching.history
    ]


def test_an_exception_is_recorded_said_once_and_switched_off_after_three(caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    watching = new_monitor(measure=[Raising(error=ValueError("x")), Checksum()])
    for step in range(6):
        watching.step(step)
    assert outcomes(watching, "raising") == [(step, "ValueError: x") for step in range(3)]
    assert outcomes(watching, "checksum") == [(step, None) for step in range(6)]
    assert len(reports(caplog)) == 1
    assert all(part in reports(caplog)[0] for part in ("`raising`", "step 0", "ValueError: x", "Training is not affected"))


@pytest.mark.parametrize("error", [ProbeError("later"), torch.OutOfMemoryError("CUDA out of memory")])
def test_only_failures_in_a_row_count(error: Exception) -> None:
    watching = new_monitor(measure=[Raising(error=error, at=(0, 1, 3, 4, 6))])
    for step in range(8):
        watching.step(step)
    assert [step for step, cause in outcomes(watching, "raising") if cause is None] == [2, 5, 7]


def test_a_refusal_is_final(caplog: Any) -> None:
    watching = new_monitor(measure=[Raising(error=RefusedError("silently wrong"))])
    for step in range(3):
        watching.step(step)
    assert outcomes(watching, "raising") == [(0, "RefusedError: silently wrong")]
    assert "switched off" in reports(caplog)[0]


def test_a_measurement_that_is_switched_off_is_still_counted_as_failing() -> None:
    """Otherwise `curvature/failed` falls back to zero just when there is nothing left to see."""
    watching = new_monitor(measure=[Raising(error=RefusedError("x"))])
    failed = [watching.step(step)[0].scalars["failed"] for step in range(3)]
    assert failed == [1.0, 1.0, 1.0]


class Dying(Rows):
    """Rows that cannot be read after a while."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = iter(range(18))  # a draw puts attributes back, but no iterators

    def __getitem__(self, index: int) -> Any:
        if next(self.reads, None) is None:
            raise OSError("disk")
        return super().__getitem__(index)


def test_data_that_cannot_be_drawn_fails_the_probe_and_nothing_else(caplog: Any) -> None:
    watching = new_monitor(probes=DataLoader(Dying(), batch_size=2), num_microbatches=2, microbatch_size=3)
    for step in range(3):
        watching.step(step)
    assert outcomes(watching, "probe") == [(0, None), (1, "OSError: disk"), (2, "OSError: disk")]
    assert [record.scalars["failed"] for record in watching.history if record.measurement == "probe"] == [0, 1, 1]
    assert len(reports(caplog)) == 1


def test_an_interrupt_passes_through_and_finds_everything_restored() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[0].eval()
    before = torch.get_rng_state()
    watching = new_monitor(model, measure=[Raising(error=KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        watching.step(0)
    assert [module.training for module in model.modules()] == [True, False, True]
    assert model[0].running_var.min() == 1
    assert torch.equal(before, torch.get_rng_state())


def test_out_of_memory_while_checking_is_left_to_the_probe(caplog: Any) -> None:
    def exhausting(model: nn.Module, rows: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    watching = new_monitor(loss=exhausting, measure=cheap())
    watching.check()
    records = watching.step(0)
    assert records[0].scalars["failed"] == 3
    assert all("OutOfMemoryError" in (record.error or "") for record in records[1:])


class Failing:
    """A sink that cannot write."""

    def write(self, records: Sequence[Record]) -> None:
        raise OSError("no space left on device")


def test_a_failing_sink_is_reported_once_and_the_others_get_everything(caplog: Any, tmp_path: Any) -> None:
    memory = MemorySink()
    watching = new_monitor(sinks=[Failing(), memory, JSONLinesSink(tmp_path / "a.jsonl")])
    for step in range(4):
        watching.step(step)
    assert memory.records == watching.history
    assert probed_steps(memory.records) == [0, 1, 2, 3]
    assert len(reports(caplog)) == 1
    assert all(part in reports(caplog)[0] for part in ("Failing", "no space left on device", "Training is not affected"))


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    F.cross_entropy(model(example_batch()[0]), example_batch()[1]).backward()
    kept = [(id(p), id(p.grad), p._version, p.grad._version) for p in model.parameters()]  # type: ignore[union-attr]
    new_monitor(model, measure=cheap()).step(0)
    assert [(id(p), id(p.grad), p._version, p.grad._version) for p in model.parameters()] == kept  # type: ignore[union-attr]


def test_measurements_may_come_from_an_iterator() -> None:
    monitor = new_monitor(measure=iter([KFACCoverage()]))
    assert "kfac_coverage" in {record.measurement for record in monitor.step(0)}
