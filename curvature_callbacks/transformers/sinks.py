"""Where the records of a Hugging Face run go beside the file: the Trainer's TensorBoard, and its log."""

from collections.abc import Callable, Sequence
from typing import Any, final

from transformers import Trainer, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback

from curvature_callbacks.record import Record, headline
from curvature_callbacks.sinks.tensorboard import TensorBoardSink


@final
class TrainerTensorBoard:
    """The Trainer's TensorBoard, whose writer may appear after the first records."""

    def __init__(self, find_writer: Callable[[], Any]) -> None:
        self._find_writer = find_writer
        self._sink: TensorBoardSink | None = None
        self._waiting: list[Sequence[Record]] = []

    def write(self, records: Sequence[Record]) -> None:
        """Draw `records`, after those that waited, or let them wait."""
        self._waiting.append(records)
        writer = self._find_writer()
        if self._sink is None and writer is not None:
            self._sink = TensorBoardSink(writer)
        while self._sink is not None and self._waiting:
            self._sink.write(self._waiting.pop(0))


@final
class TrainerLog:
    """Headline numbers through the Trainer to `log_history` and every reporter but TensorBoard, which has them already."""

    every_process = True  # `log_history` is the same everywhere; reporters choose the writer themselves

    def __init__(self, trainer: Trainer | None, state: TrainerState) -> None:
        self._trainer = trainer
        self._state = state

    def write(self, records: Sequence[Record]) -> None:
        """Log them and put the Trainer's flags back."""
        values = headline(records)
        if self._trainer is None:
            self._state.log_history.append({**values, "step": self._state.global_step})
            return
        handler, control = self._trainer.callback_handler, self._trainer.control
        callbacks, flags = handler.callbacks, dict(vars(control))
        try:
            handler.callbacks = [callback for callback in callbacks if not isinstance(callback, TensorBoardCallback)]
            Trainer.log(self._trainer, values)  # the base method: TRL's overrides flush their own metrics here
        finally:
            handler.callbacks = callbacks
            vars(control).update(flags)  # logging clears `should_log`, and with it the Trainer's own loss at this step
