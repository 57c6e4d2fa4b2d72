"""Frames: what is known of a Trainer only from the calls that led to its callback."""

import logging
import sys

from transformers import Trainer, TrainerCallback

_logger = logging.getLogger("curvature_callbacks")


def resumed_from(trainer: Trainer | None) -> str | None:
    """The folder that `trainer.train` was told to go on from, which no callback is given."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        folder = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(folder, str) and frame.f_locals.get("self") is trainer:
            return folder
    return None


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer among the calling frames that holds `callback`: callbacks are never given it."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
    _logger.warning(
        "the Trainer was not found: curvature goes to `log_history` and curvature.jsonl only, and a resumed run may not find "
        "the vectors to start from. Call `callback.attach(trainer)`."
    )
    return None
