"""Which trainable parameters a loss depends on: one that our route misses and training does not would be measured as zero."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.operators.graphs import graph_nodes


def losses_that_reach(objective: Objective, batch: Any, *, is_proved: bool) -> SampleLosses:
    """The losses of `batch`, whose graph shows that every parameter they train is reached by way of its substitute.

    Args:
        objective: of the run.
        batch: a microbatch.
        is_proved: whether that is known: then no graph is built.

    Raises:
        ConfigurationError: a parameter is read past the model's registries.

    Cost: one forward pass, its graph kept to the end of this call; one more by the live parameters where some are not reached.
    """
    if is_proved:
        with torch.no_grad():
            return objective(batch)
    stand_ins, live = objective.trainable_stand_ins(), objective.live_parameters
    with torch.enable_grad(), objective.saving():
        losses = objective(batch, stand_ins)
    leaves = graph_leaves([losses.total])
    missed = {name for name, parameter in live.items() if id(parameter) in leaves}
    unreached = [name for name, leaf in stand_ins.items() if id(leaf) not in leaves]
    if unreached and not missed and objective.can_run_live:
        with torch.enable_grad():
            of_live = graph_leaves([objective.of_live_parameters(batch).total])
        missed = {name for name in unreached if id(live[name]) in of_live}
    if missed:
        raise ConfigurationError(
            f"the loss depends on {_listed(missed, live)}, but reads it past the module that it is registered in (from a list, "
            "a closure, or a module outside the model): its curvature would come out as zero. Read it as an attribute of its "
            "module in the forward pass, or exclude it by `requires_grad_(False)` if it is not to train."
        )
    return losses


def graph_leaves(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """By id, the tensors that `tensors` were computed from and can be differentiated by. Cost: one traversal of their graph."""
    starts = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    variables = [node.variable for node in graph_nodes(starts) if "AccumulateGrad" in node.name()]  # type: ignore[attr-defined]
    return {id(variable): variable for variable in variables}


def _listed(names: Iterable[str], of_model: Iterable[str]) -> str:
    """Up to three of these names, in the model's order."""
    ordered = [name for name in of_model if name in set(names)]
    shown = ", ".join(f"`{name}`" for name in ordered[:3])
    return shown if len(ordered) <= 3 else f"{shown} and {len(ordered) - 3} more parameters"
