"""Records in a list, for looking at them in the same process."""

from collections.abc import Sequence
from typing import final

from typing_extensions import override

from curvature_callbacks.record import Record
from curvature_callbacks.sinks.base import Sink


@final
class MemorySink(Sink):
    """Keeps every record in the list `records`, on every process."""

    every_process = True

    def __init__(self) -> None:
        self.records: list[Record] = []

    @override
    def write(self, records: Sequence[Record]) -> None:
        self.records.extend(records)
