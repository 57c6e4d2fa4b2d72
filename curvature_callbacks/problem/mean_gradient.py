"""MeanGradient: the gradient of the mean loss over microbatches, with its time, the unit of all other costs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from curvature_callbacks.device import synchronise
from curvature_callbacks.model.gradients import gradients
from curvature_callbacks.model.objective import Objective


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeanGradient:
    """The gradient of `sum_i l_i / sum_i n_i` over the microbatches of this process.

    Attributes:
        by_name: parameter name to its gradient, in the parameter's shape; the shard's where parameters are sharded.
        loss: this process's part of the mean loss.
        microbatch_losses: the mean loss of each microbatch that has a valid target.
        seconds: wall time it took.
    """

    by_name: Mapping[str, Tensor]
    loss: Tensor
    microbatch_losses: Sequence[float]
    seconds: float


def mean_gradient(objective: Objective, microbatches: Sequence[Any]) -> MeanGradient:
    """The gradient by all measured parameters. Cost: one gradient, by definition."""
    synchronise(objective.device)
    start = time.perf_counter()
    leaves = objective.leaves()
    with objective.saving():
        losses = [objective(batch, leaves) for batch in microbatches]
        mean = objective.mean_of(losses)
    by_name = gradients(mean, leaves)
    synchronise(objective.device)
    return MeanGradient(
        by_name=by_name,
        loss=mean.detach(),
        microbatch_losses=[float(each.total.detach() / each.num_targets.sum()) for each in losses if each.num_targets.any()],
        seconds=time.perf_counter() - start,
    )
