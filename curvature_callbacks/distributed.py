"""The only module that speaks torch.distributed: who writes, and what cannot be measured yet."""

import torch.distributed as dist
from torch import nn

from curvature_callbacks.errors import ConfigurationError


def is_main_process() -> bool:
    """Whether this process is the only one or global rank zero."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def refuse_sharded_parameters(model: nn.Module) -> None:
    """Raise a `ConfigurationError` when `model` holds only a shard of its parameters.

    Sharding is recognised by DTensor parameters (FSDP2, tensor parallel), FSDP1's flat parameters and ZeRO-3's
    `ds_id`. A double backward through these is silently wrong or fails deep inside autograd.
    """
    for name, parameter in model.named_parameters():
        kind = type(parameter.data).__name__
        if kind == "DTensor" or type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "ds_id"):
            raise ConfigurationError(
                f"parameter `{name}` is sharded over processes, which is not supported yet: measure on one process, "
                "under DDP (rank zero measures), or offline on a checkpoint."
            )
