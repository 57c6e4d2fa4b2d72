"""Records as JSON lines: the file that always holds everything."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import final

from curvature_callbacks.record import Record


@final
class JSONLinesSink:
    """Appends each record whole, full spectra included, as one line of strict JSON.

    All lines of a probe are written and flushed together. After a kill in mid-write the torn last line is closed by the next
    run and skipped by `read_records`. The file and its directory are made at the first record.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, records: Sequence[Record]) -> None:
        """Append and flush."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(record.to_json() + "\n" for record in records)
        with self.path.open("a+b") as file:
            file.write((b"\n" if self._is_torn() else b"") + lines.encode())

    def _is_torn(self) -> bool:
        with self.path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return False
            file.seek(-1, 2)
            return file.read(1) != b"\n"


def read_records(path: str | Path) -> list[Record]:
    """The records in a JSON-lines file; lines torn by a kill are skipped."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(Record.from_json(line))
        except json.JSONDecodeError:
            continue
    return records
