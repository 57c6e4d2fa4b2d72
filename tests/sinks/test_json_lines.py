"""The file that holds everything survives a kill at any byte."""

import math
from pathlib import Path

import pytest

from curvature_callbacks import JSONLinesSink, Record, read_records


def record(step: int) -> Record:
    scalars = {"bad": math.nan, "worse": math.inf, "good": step / 3}
    return Record(step=step, measurement="hessian", block="ü", scalars=scalars, arrays={"eigenvalues": [1.0, -math.inf]})


def lines(records: list[Record]) -> list[str]:
    return [one.to_json() for one in records]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "curvature.jsonl"
    sink = JSONLinesSink(str(path))
    assert not path.parent.exists()  # made at the first record
    sink.write([record(0), record(1)])
    sink.write([record(2)])
    assert lines(read_records(path)) == lines([record(0), record(1), record(2)])


def test_a_second_sink_appends(tmp_path: Path) -> None:
    for step in range(3):
        JSONLinesSink(tmp_path / "a.jsonl").write([record(step)])
    assert lines(read_records(str(tmp_path / "a.jsonl"))) == lines([record(0), record(1), record(2)])
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 3


def test_each_probe_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    sink = JSONLinesSink(tmp_path / "a.jsonl")
    for step in range(3):
        sink.write([record(step)])
        assert len(read_records(tmp_path / "a.jsonl")) == step + 1


def test_no_records_write_nothing(tmp_path: Path) -> None:
    sink = JSONLinesSink(tmp_path / "a.jsonl")
    sink.write([])
    sink.write([record(0)])
    sink.write([])
    assert lines(read_records(tmp_path / "a.jsonl")) == lines([record(0)])


def test_a_kill_at_any_byte_costs_at_most_the_record_being_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    JSONLinesSink(path).write([record(0)])
    whole = len(path.read_bytes())
    JSONLinesSink(path).write([record(1)])
    content = path.read_bytes()
    for size in range(whole, len(content) + 1):
        path.write_bytes(content[:size])
        survived = [record(0), record(1)] if size >= len(content) - 1 else [record(0)]  # only the newline may be missing
        assert lines(read_records(path)) == lines(survived), size
        JSONLinesSink(path).write([record(2), record(3)])
        assert lines(read_records(path)) == lines([*survived, record(2), record(3)]), size


@pytest.mark.parametrize("rest", [b"", b"\n", b"\n\n"])
def test_a_file_torn_in_its_first_record_is_of_use_again(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1, "meas' + rest)
    JSONLinesSink(path).write([record(5)])
    assert lines(read_records(path)) == lines([record(5)])


def test_bytes_that_are_no_text_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\x00\x00\n")
    JSONLinesSink(path).write([record(5)])
    assert lines(read_records(path)) == lines([record(5)])


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.jsonl")
