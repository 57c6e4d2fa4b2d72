"""Sinks of the Trainer's reporters."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import PrinterCallback
from transformers.integrations import TensorBoardCallback

from curvature_callbacks import Record
from curvature_callbacks.transformers.sinks import ReporterSink
from tests.sinks.tag_cases import NotingWriter


def probe(step: int) -> list[Record]:
    return [Record(step=step, measurement="hessian", scalars={f"at_{step}": 1.0})]


def test_records_wait_for_a_writer_that_is_made_later() -> None:
    reporter, writer = TensorBoardCallback(), NotingWriter()
    sink = ReporterSink(lambda: [reporter])
    sink.write(probe(0))
    sink.write(probe(5))
    reporter.tb_writer = writer
    assert writer.tags == {}
    sink.write(probe(10))
    assert writer.tags["scalars"] == {f"curvature/hessian_at_{step:02d}" for step in (0, 5, 10)}


def test_the_first_reporter_with_a_writer_is_written_to_whatever_its_class() -> None:
    first, second = NotingWriter(), NotingWriter()
    own: Any = SimpleNamespace(tb_writer=first)
    reporters: list[Any] = [PrinterCallback(), TensorBoardCallback(), own]
    sink = ReporterSink(lambda: reporters)
    sink.write(probe(0))
    reporters.append(TensorBoardCallback(second))
    sink.write(probe(5))
    assert first.tags["scalars"] == {"curvature/hessian_at_00", "curvature/hessian_at_05"}
    assert second.tags == {}
