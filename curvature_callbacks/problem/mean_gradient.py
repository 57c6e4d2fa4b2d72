"""MeanGradient: the gradient of the mean loss over microbatches, with its time, the unit of all other costs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from curvature_callbacks.device import synchronise
from curvature_callbacks.model.objective import Objective, gradients


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeanGradient:
    """The gradient of `sum_i l_i / sum_i n_i` over the microbatches of this process.

    Attributes:
        by_name: parameter name to its gradient, in the parameter's shape; the shard's where parameters are sharded.
        seconds: wall time it took.
    """

    by_name: Mapping[str, Tensor]
    seconds: float


def mean_gradient(objective: Objective, microbatches: Sequence[Any]) -> MeanGradient:
    """The gradient by all measured parameters. Cost: one gradient, by definition."""
    synchronise(objective.device)
    start = time.perf_counter()
    leaves = objective.leaves()
    with objective.saving():
        mean = objective.mean(microbatches, leaves)
    by_name = gradients(mean, leaves)
    synchronise(objective.device)
    return MeanGradient(by_name=by_name, seconds=time.perf_counter() - start)
