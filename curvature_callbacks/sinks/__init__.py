"""Sinks: what receives records. They know records, not trainers."""

from curvature_callbacks.sinks.base import Sink
from curvature_callbacks.sinks.json_lines import JSONLinesSink, read_records
from curvature_callbacks.sinks.memory import MemorySink

__all__ = ["JSONLinesSink", "MemorySink", "Sink", "read_records"]
