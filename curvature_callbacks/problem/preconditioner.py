"""The optimizer of a problem: where its next step is stable, and the preconditioner that says so."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.model.stability import Optimizers, Stability, read_stability
from curvature_callbacks.processes.fsdp import shard, unsharded
from curvature_callbacks.processes.world import World


def stability_of(
    optimizer: Optimizers | None, parameters: Mapping[str, Tensor], objective: Objective, world: World
) -> Stability:
    """Where the optimizer's next step of the model's own `parameters` is stable; see `read_stability`.

    Its state is read as vectors of the objective are held: shards on each process where the parameters are sharded, else whole
    tensors.

    Raises:
        ConfigurationError: no optimizer, or one of other parameters.
        RefusedError: the optimizer's update is not known.
    """
    if optimizer is None:
        raise ConfigurationError("`optimizer` is needed for its preconditioner, got None: pass the one that trains the model.")
    read = shard if objective.is_sharded else partial(unsharded, world=world)
    return read_stability(optimizer, parameters, dtype=objective.dtype, read=read)
