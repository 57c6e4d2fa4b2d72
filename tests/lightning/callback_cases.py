"""Callbacks and modules for tests of the Lightning callback."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from curvature_callbacks.lightning.callback import CurvatureCallback
from tests.lightning_runs import Net
from tests.training_cases import callback_options


def new_callback(**changes: Any) -> CurvatureCallback:
    return CurvatureCallback(**callback_options(**changes))


class CountingNet(Net):
    """Counts what a probe must never do: training steps are only those of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.num_updates = 0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.num_updates += 1


def points(accumulator: EventAccumulator, tag: str) -> dict[int, float]:
    """Step to value; each step is written once."""
    found = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    assert len(dict(found)) == len(found), found
    return dict(found)


def events(directory: str | Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


class SaveAt(pl.Callback):
    """Saves a checkpoint after so many steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
