"""Where the records of a Lightning run go: its loggers, and a file that holds everything."""

from collections.abc import Sequence
from pathlib import Path
from typing import final

from torch import tensor
from typing_extensions import override

from curvature_callbacks.lightning.framework import Logger, Trainer
from curvature_callbacks.record import Record, headline, in_progress_bar, scalar_tags
from curvature_callbacks.sinks import JSONLinesSink, Sink
from curvature_callbacks.sinks.loggers import sink_of


def logger_sinks(trainer: Trainer) -> list[Sink]:
    """The file in the run's directory, then one sink a logger; none in a `fast_dev_run`."""
    directory = trainer.log_dir  # on all ranks: it broadcasts
    if getattr(trainer, "fast_dev_run", False):
        return []
    path = Path(directory or trainer.default_root_dir) / "curvature.jsonl"
    return [JSONLinesSink(path), *(sink_of(logger) or _ScalarSink(logger) for logger in trainer.loggers)]


@final
class HeadlineSink(Sink):
    """Headline numbers where other callbacks (ModelCheckpoint) and the progress bar find them, on every process."""

    every_process = True

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @override
    def write(self, records: Sequence[Record]) -> None:
        self._trainer.callback_metrics.update({tag: tensor(value) for tag, value in headline(records).items()})
        self._trainer.progress_bar_metrics.update(in_progress_bar(records))


@final
class _ScalarSink(Sink):
    """Scalars straight to a logger: `self.log` from a callback repeats, drops or moves values."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    @override
    def write(self, records: Sequence[Record]) -> None:
        self._logger.log_metrics(scalar_tags(records), step=records[0].step)
