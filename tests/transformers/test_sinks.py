"""Sinks of the Trainer's reporters."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import PrinterCallback
from transformers.integrations import TensorBoardCallback

from curvature_callbacks import Record
from curvature_callbacks.transformers.sinks import ReporterSink, reporter_sinks
from tests.sinks.tag_cases import NotingWriter


def probe(step: int) -> list[Record]:
    return [Record(step=step, measurement="hessian", scalars={f"at_{step}": 1.0})]


def test_records_wait_for_a_writer_that_is_made_later() -> None:
    reporter, writer = TensorBoardCallback(), NotingWriter()
    sink = ReporterSink(reporter)
    sink.write(probe(0))
    sink.write(probe(5))
    reporter.tb_writer = writer
    assert writer.tags == {}
    sink.write(probe(10))
    assert writer.tags["scalars"] == {f"curvature/hessian_at_{step:02d}" for step in (0, 5, 10)}


def test_reporters_of_scalars_have_no_sink_of_their_own() -> None:
    callbacks: list[Any] = [PrinterCallback(), TensorBoardCallback(NotingWriter())]
    trainer: Any = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=callbacks))
    assert len(reporter_sinks(trainer)) == 1
    assert reporter_sinks(None) == []
