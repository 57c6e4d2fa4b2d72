"""Batch norm: by which statistics its modules normalise while a loss is measured."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, final

import torch
import torch.distributed
from torch import Tensor, nn

from curvature_callbacks.errors import RefusedError
from curvature_callbacks.library_internals.modules import buffers_of, is_batch_norm

BatchNorm = Literal["eval", "batch"]

_RUNNING: Final = ("running_mean", "running_var")  # how torch, timm, torchvision and most users' own modules name them

_WITHIN_ROWS: Final = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@final
@dataclass(frozen=True, slots=True, eq=False)
class BatchNorms:
    """The modules of a model that normalise by statistics of their batch, as training does.

    Attributes:
        switched: those among them that would use running statistics in evaluation mode.
        are_coupling: whether any normalises over rows, so that the loss of a row depends on the others.
    """

    switched: tuple[nn.Module, ...] = ()
    are_coupling: bool = False

    @contextmanager
    def in_training_mode(self) -> Iterator[None]:
        """Inside, the modules normalise by their batch. Pass them copies of their buffers: they write to these."""
        try:
            for module in self.switched:
                module.training = True
            yield
        finally:
            for module in self.switched:
                module.training = False

    def refuse_synchronised(self) -> None:
        """Raise a `RefusedError` where a module normalises the batches of several processes together."""
        if any(_spans_processes(module) for module in self.switched):
            raise RefusedError(
                "the model has a SyncBatchNorm over several processes, whose batches it normalises together: the loss of a "
                "process depends on the rows of the others, and there are no products for that. Choose `batch_norm`='eval' to "
                "measure on running statistics."
            )

    def buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Name to what the modules write to when they normalise by their batch, of `model` that holds them."""
        written = {id(buffer) for module in self.switched for buffer in buffers_of(module).values() if buffer is not None}
        return {name: buffer for name, buffer in model.named_buffers() if id(buffer) in written}


def batch_norms(model: nn.Module, *, batch_norm: BatchNorm, in_training: Collection[nn.Module]) -> BatchNorms:
    """The modules of `model` that normalise by their batch, by choice or because they know nothing else.

    With `batch` those that training has in training mode: one that its user has put in evaluation mode stays there. Where no
    module at all was in training mode the flags tell nothing, and all count as if they were. Known are modules derived from
    torch's batch and instance norms, and any that holds `running_mean` and `running_var`. An instance norm couples no rows.

    Args:
        model: in evaluation mode.
        batch_norm: by which statistics.
        in_training: the modules that training has in training mode.

    Cost: a look at every module.
    """
    norms = [module for module in model.modules() if _normalises(module)]
    switched = [
        module
        for module in norms
        if batch_norm == "batch" and _has_running_statistics(module) and (not in_training or module in in_training)
    ]
    always = [module for module in norms if not _has_running_statistics(module)]
    return BatchNorms(tuple(switched), any(not isinstance(module, _WITHIN_ROWS) for module in [*switched, *always]))


def _normalises(module: nn.Module) -> bool:
    return is_batch_norm(module) or _has_running_statistics(module)


def _has_running_statistics(module: nn.Module) -> bool:
    buffers = buffers_of(module)
    return all(buffers.get(name) is not None for name in _RUNNING)


def _spans_processes(module: nn.Module) -> bool:
    if not isinstance(module, nn.SyncBatchNorm) or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size(module.process_group) > 1
