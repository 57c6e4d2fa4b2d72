"""What every sink promises: it takes any records, in order, and never changes them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from curvature_callbacks import JSONLinesSink, MemorySink, Record, Sink
from curvature_callbacks.sinks.loggers import LOGGERS
from curvature_callbacks.sinks.tensorboard import TensorBoardSink


def sinks(tmp_path: Path) -> dict[str, Callable[[], Any]]:
    return {
        "memory": MemorySink,
        "json lines": lambda: JSONLinesSink(tmp_path / "a.jsonl"),
        "tensorboard": lambda: TensorBoardSink(SummaryWriter(str(tmp_path))),
    }


@pytest.fixture(params=["memory", "json lines", "tensorboard"])
def sink(request: Any, tmp_path: Path) -> Any:
    return sinks(tmp_path)[request.param]()


def record(**changes: Any) -> Record:
    return Record(**({"step": 1, "measurement": "empirical_fisher"} | changes))


WILD = {"condition_number": math.inf, "lambda_max": math.nan, "trace": -math.inf, "effective_rank": -1.0, "rank": math.nan}
SPECTRUM = {"a": [2.0, 1.0]}
PROBES: dict[str, list[Record]] = {
    "none": [],
    "empty": [record()],
    "failed": [record(error="RuntimeError: `|` \n\n| a table? |"), record(measurement="probe", scalars={"failed": 1.0})],
    "non-finite": [record(block="b", scalars=WILD, arrays={"eigenvalues": [math.nan, -math.inf]}), record(scalars=WILD)],
    "infinite spectrum": [record(arrays={"eigenvalues": [math.inf, 1.0]}), record(arrays={"eigenvalues": [math.inf] * 2})],
    "zeros": [record(block="b", scalars=dict.fromkeys(WILD, 0.0), arrays={"eigenvalues": [0.0, 0.0]})],
    "charts": [record(block="b", scalars={"x": 1.0}, curves=("x", "absent"), arrays=SPECTRUM, charts={"a": "histogram"})],
    "charts without arrays": [
        record(charts={"a": "histogram", "b": "density"}),
        record(arrays=SPECTRUM, charts={"a": "density"}),
    ],
    "one eigenvalue": [record(block="b", scalars={"trace": 1.0}, arrays={"eigenvalues": [1.0]})],
    "empty spectrum": [record(block="b", arrays={"eigenvalues": []})],
    "extremes": [record(block="b", scalars={"trace": 5e-324, "lambda_max": 1e308}, arrays={"eigenvalues": [1e308, 5e-324]})],
    "equal eigenvalues": [record(block="b", arrays={"eigenvalues": [2.0, 2.0, 2.0]})],
    "negative eigenvalues": [record(measurement="hessian", arrays={"eigenvalues": [3.0, -1.0], "residuals": [0.1, 0.1]})],
    "odd names": [record(block="ü/ä $[0]", measurement="my measurement!", scalars={"a/b": 1.0, "": 2.0})],
    "metadata": [record(metadata={"uncovered": {"a.b": "why"}, "list": [1, None], "error": math.inf})],
    "several steps": [record(step=1, scalars={"x": 1.0}), record(step=1, block="c", scalars={"trace": 1.0})],
}


def test_the_sink_of_every_logger_is_here(tmp_path: Path) -> None:
    made = {type(make()) for make in sinks(tmp_path).values()}
    assert {logger.sink for logger in LOGGERS.values()} <= made


class TestSink:
    def test_it_is_a_sink(self, sink: Any) -> None:
        assert isinstance(sink, Sink)

    @pytest.mark.parametrize("name", PROBES)
    def test_it_takes_every_kind_of_record(self, sink: Any, name: str) -> None:
        before = [result.to_json() for result in PROBES[name]]
        sink.write(PROBES[name])
        sink.write(PROBES[name])
        assert [result.to_json() for result in PROBES[name]] == before

    def test_it_takes_one_probe_after_the_other(self, sink: Any) -> None:
        for step, records in enumerate(PROBES.values()):
            assert sink.write([replace(result, step=step) for result in records]) is None

    def test_it_draws_from_no_generator(self, sink: Any) -> None:
        before = torch.get_rng_state()
        for records in PROBES.values():
            sink.write(records)
        assert torch.equal(before, torch.get_rng_state())
