"""Callbacks and Trainers for tests of the callback for the Hugging Face Trainer."""

from typing import Any

from transformers import Trainer

from curvature_callbacks.transformers.callback import CurvatureCallback
from tests.training_cases import callback_options
from tests.transformers_runs import Sentences, language_model, training_arguments

SHARPNESS = "curvature/hessian_lambda_max"


def new_callback(**changes: Any) -> CurvatureCallback:
    return CurvatureCallback(**callback_options(**changes))


def trainer_for(directory: Any, callbacks: list[Any], **changes: Any) -> Trainer:
    """A Trainer on the usual case; `model` and `data` may be given."""
    model, data = changes.pop("model", None), changes.pop("data", None)
    return Trainer(
        model=language_model() if model is None else model,
        args=training_arguments(directory, **changes),
        train_dataset=Sentences() if data is None else data,
        callbacks=callbacks,
    )
