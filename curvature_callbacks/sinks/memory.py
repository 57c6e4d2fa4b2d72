"""Records in a list, for looking at them in the same process."""

from collections.abc import Sequence
from typing import final

from curvature_callbacks.record import Record


@final
class MemorySink:
    """Keeps every record in the list `records`, on every process."""

    every_process = True

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, records: Sequence[Record]) -> None:
        """Append `records`."""
        self.records.extend(records)
