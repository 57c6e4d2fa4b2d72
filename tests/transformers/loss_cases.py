"""Trainers with losses of their own, and the loss that the callback makes of them."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, Trainer

from curvature_callbacks.isolation.generators import begun_at, global_generators
from curvature_callbacks.processes.world import SINGLE
from curvature_callbacks.transformers.callback import CurvatureCallback
from curvature_callbacks.transformers.loss import loss_of_trainer
from tests.configurations.transformers_parts import Unpadded
from tests.training_cases import callback_options, seed_everything
from tests.transformers_runs import language_model, training_arguments

SMOOTHING = {"label_smoothing_factor": 0.2}


class Unlisted(GPT2LMHeadModel):
    """A model that shifts inside itself and that the Trainer, which goes by names, does not know to be causal."""


def unlisted() -> nn.Module:
    return Unlisted(language_model().config)


def adapted() -> nn.Module:
    settings = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(language_model(), settings)


def trainer_for(
    directory: Any,
    callbacks: Any = (),
    *,
    kind: type[Trainer] = Trainer,
    model: Callable[[], nn.Module] = language_model,
    data: Callable[[], Any] = Unpadded,
    arguments: Callable[[], dict[str, Any]] = dict,
    **changes: Any,
) -> Trainer:
    seed_everything()
    made = {"model": model(), "args": training_arguments(directory, **changes), "train_dataset": data()}
    return kind(**made, callbacks=list(callbacks), **arguments())


def new_callback(**changes: Any) -> CurvatureCallback:
    return CurvatureCallback(**callback_options(loss_fn="trainer", **changes))


def batch_of(trainer: Trainer, rows: int = 5) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])


def evaluated(trainer: Trainer, batch: dict[str, Tensor]) -> Any:
    """The Trainer's loss by generators that begin where they did before, as an objective evaluates it."""
    function: Any = loss_of_trainer(trainer, SINGLE)
    with begun_at(global_generators(torch.device("cpu")), 0):
        return function(trainer.model.eval(), batch)


class Passing(Trainer):
    """The model's own loss by way of an overridden `compute_loss`, as a logging subclass gives it."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)
