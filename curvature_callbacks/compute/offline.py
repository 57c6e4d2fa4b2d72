"""A problem outside any training loop, which the one-call functions measure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from torch import nn

from curvature_callbacks.batches import as_microbatches
from curvature_callbacks.errors import check_choice
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.model.batch_norm import BatchNorm
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.problem.occasion import Occasion
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.problem.subject import Subject


@contextmanager
def offline_problem(
    model: nn.Module,
    batches: Any,
    *,
    loss: Loss,
    params_filter: ParamsFilter | None,
    block_structure: BlockStructure = "layer",
    seed: int = 0,
    optimizer: Optimizers | None = None,
    batch_norm: BatchNorm | None = None,
) -> Iterator[Problem]:
    """The problem of `batches`, checked, inside `isolated`: the model is left as found. The batches count as whole ones."""
    if batch_norm is not None:
        check_choice("batch_norm", batch_norm, get_args(BatchNorm))
    with isolated(model, seed=seed) as in_training:
        subject = Subject(
            model=model,
            loss=loss,
            params_filter=params_filter,
            block_structure=block_structure,
            optimizer=optimizer,
            batch_norm=batch_norm,
        )
        occasion = Occasion(seed=seed, step=0, in_training=in_training)
        problem = Problem.of(subject, as_microbatches(batches), occasion, sharing={})
        problem.check()
        yield problem
