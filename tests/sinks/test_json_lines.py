"""The file that holds everything survives a kill at any byte."""

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest

from curvature_callbacks import JSONLinesSink, Record, read_records


def record(step: int) -> Record:
    scalars = {"bad": math.nan, "worse": math.inf, "good": step / 3}
    return Record(step=step, measurement="hessian", block="ü", scalars=scalars, arrays={"eigenvalues": [1.0, -math.inf]})


def lines(records: list[Record]) -> list[str]:
    return [record.to_json() for record in records]


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
    complete = len(path.read_bytes())
    JSONLinesSink(path).write([record(1)])
    content = path.read_bytes()
    for size in range(complete, len(content) + 1):
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


def test_a_file_cut_at_any_byte_keeps_every_whole_record_before_and_after(tmp_path: Path) -> None:
    sink = JSONLinesSink(tmp_path / "a.jsonl")
    before = [Record(step=step, measurement="ü\u2028", scalars={"x": math.inf}) for step in range(3)]
    after = [Record(step=9, measurement="after")]
    sink.write(before)
    content = sink.path.read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]  # a record is whole without its line end
    for size in range(len(content) + 1):
        sink.path.write_bytes(content[:size])
        complete = before[: sum(end <= size for end in ends)]
        assert read_records(sink.path) == complete
        sink.write(after)
        sink.write(after)
        assert read_records(sink.path) == complete + after + after


def failing_write(monkeypatch: Any, *, room: int, error: int = errno.ENOSPC) -> None:
    """A disk with room for so many bytes, which takes at most 20 at once."""
    left, write = [room], os.write

    def limited(descriptor: int, content: bytes) -> int:
        if left[0] == 0:
            raise OSError(error, os.strerror(error))
        done = write(descriptor, content[: min(left[0], 20)])
        left[0] -= done
        return done

    monkeypatch.setattr(os, "write", limited)


@pytest.mark.parametrize("room", [0, 1, 20, 150, 260])
def test_what_a_full_disk_has_no_room_for_is_taken_back(tmp_path: Path, monkeypatch: Any, room: int) -> None:
    sink = JSONLinesSink(tmp_path / "a.jsonl")
    first, lost, last = ([Record(step=step, measurement=name) for name in ("probe", "x")] for step in range(3))
    sink.write(first)
    content = sink.path.read_bytes()
    with monkeypatch.context() as full:
        failing_write(full, room=room)
        with pytest.raises(OSError, match="No space left"):
            sink.write(lost)
    assert sink.path.read_bytes() == content
    sink.write(last)
    assert read_records(sink.path) == first + last


def test_a_write_in_pieces_is_whole(tmp_path: Path, monkeypatch: Any) -> None:
    sink, records = JSONLinesSink(tmp_path / "a.jsonl"), [Record(step=1, measurement="x" * 100)]
    failing_write(monkeypatch, room=10_000)
    sink.write(records)
    assert read_records(sink.path) == records


@pytest.mark.parametrize("room", [0, 30, 120])
def test_what_cannot_be_taken_back_is_closed_by_the_next_write(tmp_path: Path, monkeypatch: Any, room: int) -> None:
    sink = JSONLinesSink(tmp_path / "a.jsonl")
    first, lost, last = ([Record(step=step, measurement="probe")] for step in range(3))
    sink.write(first)

    def broken(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as full:
        failing_write(full, room=room)
        full.setattr(os, "ftruncate", broken)
        with pytest.raises(OSError, match="No space left"):
            sink.write(lost)
    sink.write(last)
    assert read_records(sink.path) == first + last


def test_a_write_that_fails_leaves_what_another_run_appended(tmp_path: Path, monkeypatch: Any) -> None:
    sink, other = (JSONLinesSink(tmp_path / "a.jsonl") for _ in range(2))
    theirs = [Record(step=5, measurement="theirs")]
    write = os.write

    def interrupted(descriptor: int, content: bytes) -> int:
        monkeypatch.setattr(os, "write", write)
        other.write(theirs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(OSError, match="No space left"):
        sink.write([Record(step=1, measurement="mine")])
    assert read_records(sink.path) == theirs
