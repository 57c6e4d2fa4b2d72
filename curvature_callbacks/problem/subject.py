"""Subject: what all probes of a run look at."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import nn

from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.batch_norm import BatchNorm, batch_norms
from curvature_callbacks.model.blocks import Blocks, BlockStructure
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.objective import Objective, ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.processes.gathering import on_use_parameters
from curvature_callbacks.processes.world import World


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """The model and its loss, and which of its parameters are measured in which blocks.

    Attributes:
        model: the module training runs, unwrapped.
        loss: see `resolve_loss`.
        params_filter: `(name, parameter) -> bool`, which trainable parameters are measured; None for all.
        block_structure: see `group_blocks`.
        optimizer: what trains the model, or several of them; only read.
        memory: what the probes so far have learnt of loss and blocks; updated.
        batch_norm: by which statistics; see `Problem`.
    """

    model: nn.Module
    loss: Loss
    params_filter: ParamsFilter | None
    block_structure: BlockStructure
    optimizer: Optimizers | None
    memory: ProbeMemory = field(default_factory=ProbeMemory)
    batch_norm: BatchNorm | None = None

    @property
    def device(self) -> torch.device:
        """That of the model's first parameter."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def has_batch_norms(self) -> bool:
        """Whether a batch norm may couple rows, if training has it in training mode. Cost: a look at every module."""
        return batch_norms(self.model, batch_norm=self.batch_norm or "batch", in_training=()).are_coupling

    def objective(self, microbatches: Sequence[Microbatch], world: World) -> tuple[Objective, list[Microbatch]]:
        """The loss as a function of the parameters, and the microbatches on the model's device.

        With sharded parameters every process has as many microbatches as the others, for all must take part in every pass.

        Raises:
            ConfigurationError: no trainable parameter, or an undeterminable loss.
            RefusedError: sharded parameters, and a microbatch that stays whole has more rows than another process's.
        """
        on_device = [microbatch.on(self.device) for microbatch in microbatches]
        loss = self.memory.loss_of_run(self.loss, on_device[0].content)
        on_use = on_use_parameters(self.model, world, self.device)
        if on_use is not None:
            on_device = _in_step(on_device, world)
        objective = Objective(
            self.model,
            loss,
            params_filter=self.params_filter,
            on_use=on_use,
            world=world,
            rewritten=self.memory.rewritten,
            draws=self.memory.draws,
        )
        return objective, on_device

    def blocks(self, names: Iterable[str]) -> Blocks:
        """The blocks of the measured parameters of these names."""
        return self.memory.blocks_of_run(self.model, tuple(names), self.block_structure)


def _in_step(microbatches: Sequence[Microbatch], world: World) -> list[Microbatch]:
    """As many microbatches, of as many rows, on every process: every pass gathers parameters, and all must take part.

    Raises:
        RefusedError: a microbatch that stays whole has more rows than that of another process.
    """
    sizes = world.gathered([batch.num_rows for batch in microbatches])
    common = [min(of_processes) for of_processes in zip(*sizes, strict=False)]
    with world.together():
        return [batch.take(torch.arange(size)) for batch, size in zip(microbatches, common, strict=False)]
