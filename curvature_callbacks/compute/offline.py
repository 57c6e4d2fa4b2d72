"""A problem outside any training loop, which the one-call functions measure."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from torch import nn

from curvature_callbacks.errors import check_choice, is_out_of_memory
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.microbatch import as_microbatches
from curvature_callbacks.model.batch_norm import BatchNorm
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.problem.occasion import Occasion
from curvature_callbacks.problem.packing import as_drawn, may_take_apart
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.problem.subject import Subject
from curvature_callbacks.problem.training_mode import settle_training_mode

_logger = logging.getLogger("curvature_callbacks")


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
        if not may_take_apart(problem, subject.memory):
            problem = Problem.of(subject, as_drawn(problem.microbatches), occasion, sharing={})
        _check_in_either_mode(problem, subject, occasion)
        if problem.objective.draws.is_random:
            _logger.warning("the loss draws random numbers: what is measured is it at one draw, that of `seed`=%d.", seed)
        yield problem


def _check_in_either_mode(problem: Problem, subject: Subject, occasion: Occasion) -> None:
    """Check it; where that is impossible in evaluation mode, with modules in training mode."""
    try:
        problem.settle_loss()
        problem.check(rows=2)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        settle_training_mode(problem, subject.memory, occasion.in_training)
        if not subject.memory.in_training_mode:
            raise
        problem.settle_loss()
        problem.check(rows=2)
