"""Records as JSON lines: the file that always holds everything."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import final

from typing_extensions import override

from curvature_callbacks.record import Record
from curvature_callbacks.sinks.base import Sink


@final
class JSONLinesSink(Sink):
    """Appends each record with all its arrays as one line of strict JSON.

    All lines of a probe are written together. After a kill in mid-write the torn last line is closed by the next run and
    skipped by `read_records`; what a full disk had no room for is taken back, and the error raised. The file and its directory
    are made at the first record.

    Args:
        path: the file.

    Raises:
        OSError: of `write`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @override
    def write(self, records: Sequence[Record]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(record.to_json() + "\n" for record in records)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _append(descriptor, (b"\n" if self._is_torn() else b"") + lines.encode())
        finally:
            os.close(descriptor)

    def _is_torn(self) -> bool:
        with self.path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return False
            file.seek(-1, 2)
            return file.read(1) != b"\n"


def _append(descriptor: int, content: bytes) -> None:
    """Append all of `content` or nothing.

    Without Python's buffer, which would try the rest of a failed write again when it is closed.
    """
    before, written = os.fstat(descriptor).st_size, 0
    try:
        while written < len(content):
            written += os.write(descriptor, content[written:])
    except OSError:
        with suppress(OSError):
            if os.fstat(descriptor).st_size == before + written:  # else another run has appended to the same file
                os.ftruncate(descriptor, before)
        raise


def read_records(path: str | Path) -> list[Record]:
    """The records in a JSON-lines file of any version; lines torn by a kill are skipped."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(Record.from_json(line))
        except json.JSONDecodeError:
            continue
    return records
