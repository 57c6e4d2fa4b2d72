"""Sink: the interface of what receives the records of each probe."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from curvature_callbacks.record import Record


@runtime_checkable
class Sink(Protocol):
    """Receives the records of each probe, once, in order. An exception in `write` is caught and reported by the monitor.

    Of many processes only rank zero's is called, unless it has an attribute `every_process` that is true.
    """

    def write(self, records: Sequence[Record]) -> None:
        """Take the records of one probe."""
        ...
