"""A problem outside any training loop, which the one-call functions measure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from curvature_callbacks.batches import as_microbatches
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.problem.problem import Problem


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
) -> Iterator[Problem]:
    """The problem of `batches`, checked, inside `isolated`: the model is left as found."""
    with isolated(model, seed=seed):
        problem = Problem(
            model,
            as_microbatches(batches),
            loss=loss,
            params_filter=params_filter,
            block_structure=block_structure,
            seed=seed,
            optimizer=optimizer,
        )
        problem.check()
        yield problem
