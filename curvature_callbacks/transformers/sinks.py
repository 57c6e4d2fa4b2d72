"""Where the records of a Hugging Face run go beside the file: reporters that have a sink, and the Trainer's log."""

from collections.abc import Callable, Sequence
from typing import Any, final

from transformers import Trainer, TrainerCallback, TrainerState
from typing_extensions import override

from curvature_callbacks.record import Record, headline
from curvature_callbacks.sinks.base import Sink
from curvature_callbacks.sinks.loggers import has_sink, sink_of


def reporters_of(trainer: Trainer | None) -> Sequence[TrainerCallback]:
    """What `trainer` calls, reporters among them; nothing where there is no Trainer."""
    return trainer.callback_handler.callbacks if trainer is not None else []


def tensorboard_writer(reporters: Sequence[TrainerCallback]) -> Any:
    """The writer of the first reporter that has one for TensorBoard; None while there is none."""
    writers = (getattr(reporter, "tb_writer", None) for reporter in reporters)
    return next((writer for writer in writers if writer is not None), None)


@final
class ReporterSink(Sink):
    """The Trainer's first reporter that has a writer; reporter and writer may appear after the first records."""

    def __init__(self, reporters: Callable[[], Sequence[TrainerCallback]]) -> None:
        self._reporters = reporters
        self._sink: Sink | None = None
        self._waiting: list[Sequence[Record]] = []

    @override
    def write(self, records: Sequence[Record]) -> None:
        self._waiting.append(records)
        if self._sink is None:
            self._sink = next(filter(None, map(sink_of, self._reporters())), None)
        while self._sink is not None and self._waiting:
            self._sink.write(self._waiting.pop(0))


@final
class TrainerLog(Sink):
    """Headline numbers through the Trainer to `log_history` and the reporters that have no sink of their own."""

    every_process = True  # `log_history` is the same everywhere; reporters choose the writer themselves

    def __init__(self, trainer: Trainer | None, state: TrainerState) -> None:
        self._trainer = trainer
        self._state = state

    @override
    def write(self, records: Sequence[Record]) -> None:
        values = headline(records)
        if self._trainer is None:
            self._state.log_history.append({**values, "step": self._state.global_step})
            return
        handler, control = self._trainer.callback_handler, self._trainer.control
        callbacks, flags = handler.callbacks, dict(vars(control))
        try:
            handler.callbacks = [callback for callback in callbacks if not has_sink(callback)]
            Trainer.log(self._trainer, values)  # the base method: TRL's overrides flush their own metrics here
        finally:
            handler.callbacks = callbacks
            vars(control).update(flags)  # logging clears `should_log`, and with it the Trainer's own loss at this step
