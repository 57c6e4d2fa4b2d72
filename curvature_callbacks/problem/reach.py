"""Which trainable parameters a loss depends on: one that our route misses and training does not would be measured as zero."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.library_internals.tensors import has_gradient_hooks
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.operators.graphs import graph_nodes


@final
@dataclass(frozen=True, slots=True, eq=False)
class Reached:
    """The losses of a microbatch with their graph.

    Attributes:
        losses: of the microbatch.
        stand_ins: of all trainable parameters, by name.
    """

    losses: SampleLosses
    stand_ins: Mapping[str, Tensor]


def check_reach(objective: Objective, batch: Any) -> Reached:
    """The losses of `batch`, every parameter that they train reached by way of its substitute.

    Call it after the first pass without gradients, in which a loss settles its form and may call the model more often.

    Raises:
        ConfigurationError: a parameter is read past the model's registries; the loss depends on none, or a hook makes its
            gradient.

    Cost: one forward pass with its graph; one more by the live parameters where some are not reached.
    """
    stand_ins, live = objective.trainable_stand_ins(), objective.live_parameters
    with torch.enable_grad(), objective.saving():
        losses = objective(batch, stand_ins)
    leaves = graph_leaves([losses.total])
    missed = {name for name, parameter in live.items() if id(parameter) in leaves}
    unreached = [name for name, leaf in stand_ins.items() if id(leaf) not in leaves]
    if unreached and not missed and objective.live_obstacle is None:
        with torch.enable_grad():
            of_live = graph_leaves([objective.of_live_parameters(batch).total])
        missed = {name for name in unreached if id(live[name]) in of_live}
    if missed:
        raise ConfigurationError(
            f"the loss depends on {_listed(missed, live)}, but reads it past the module that it is registered in (from a list, "
            "a closure, or a module outside the model): its curvature would come out as zero. Read it as an attribute of its "
            "module in the forward pass, or exclude it by `requires_grad_(False)` if it is not to train."
        )
    if int(losses.num_targets.sum()) > 0:
        _refuse_without_gradient(leaves, {id(leaf) for leaf in stand_ins.values()})
    return Reached(losses, stand_ins)


def _refuse_without_gradient(leaves: Mapping[int, Tensor], parameters: Set[int]) -> None:
    """Refuse a loss by the `leaves` of its graph, where it has not the gradient that trains; both by id."""
    others = [leaf for key, leaf in leaves.items() if key not in parameters]
    if any(leaf.numel() == 1 and has_gradient_hooks(leaf) for leaf in others):
        raise ConfigurationError(
            "the loss, or a part of it, is a detached value whose gradient a hook makes in `backward()` (losses that cache "
            "gradients do that): by `autograd.grad` it is zero, and so is all curvature. Pass the same loss without the cache "
            "as a loss function for the probes."
        )
    if not leaves.keys() & parameters:
        raise ConfigurationError(
            "the loss depends on no trainable parameter: its value is detached, computed without gradients or constant, and "
            "all curvature would be zero. Return the loss as it is before `.detach()`, `.item()` or `no_grad`, or pass "
            "a loss function that does."
        )


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
