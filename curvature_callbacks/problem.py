"""Problem: model, blocks, loss and microbatches of one probe; what measurements share is built once."""

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from curvature_callbacks.batches import to_device
from curvature_callbacks.errors import ConfigurationError, RefusedError
from curvature_callbacks.gram.engine import BlockGrams, Trust, block_grams, parameter_operations
from curvature_callbacks.model.blocks import Blocks, BlockStructure, group_blocks
from curvature_callbacks.model.checks import check_model, second_order_obstacle
from curvature_callbacks.model.losses import Loss, resolve_loss
from curvature_callbacks.model.objective import Objective, ParamsFilter, gradients
from curvature_callbacks.operators.hessian import HessianOperator


@final
class Problem:
    """What one probe measures. Build and use it inside `isolated(model)`; it must not outlive its probe.

    Args:
        model: the module training runs, unwrapped.
        microbatches: moved to the model's device.
        loss: see `resolve_loss`.
        params_filter: `(name, parameter) -> bool`, which trainable parameters to measure; default all.
        block_structure: see `group_blocks`.
        seed: seeds every random choice of the measurements.
        step: optimizer steps completed.
        trust: what earlier probes of the run proved about the capture; updated.

    Raises:
        ConfigurationError: no trainable parameter, an undeterminable loss, no microbatch.
    """

    def __init__(
        self,
        model: nn.Module,
        microbatches: Sequence[Any],
        *,
        loss: Loss = None,
        params_filter: ParamsFilter | None = None,
        block_structure: BlockStructure = "layer",
        seed: int = 0,
        step: int = 0,
        trust: Trust | None = None,
    ) -> None:
        if not microbatches:
            raise ConfigurationError("`batches` must hold at least one microbatch, got none.")
        check_model(model)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.model = model
        self.microbatches = [to_device(batch, device) for batch in microbatches]
        self.seed = seed
        self.step = step
        self.objective = Objective(model, resolve_loss(loss, self.microbatches[0]), params_filter=params_filter)
        self.blocks: Blocks = group_blocks(model, self.objective.parameters, block_structure)
        self.gradient_seconds = 0.0  # wall time of one gradient, once `gradients` was asked for
        self._trust = Trust() if trust is None else trust

    def check(self) -> None:
        """Raise a `ConfigurationError` when no sample has a valid target. Cost: one forward pass."""
        with torch.no_grad():
            valid = sum(int(self.objective(batch).num_targets.sum()) for batch in self.microbatches)
        if valid == 0:
            raise ConfigurationError(
                "every label of the drawn microbatches is ignored (-100): the loss is undefined. Check the collator and the "
                "labels, or give probe data of its own."
            )

    @cached_property
    def block_grams(self) -> BlockGrams:
        """Grams of all blocks; see `gram.engine.block_grams`."""
        return block_grams(self.objective, self.microbatches, self.blocks, trust=self._trust, seed=self.seed)

    @cached_property
    def operations(self) -> Mapping[str, list[str]]:
        """Parameter to the operations that use it. Cost: nothing beside `block_grams`, else one forward pass."""
        if "block_grams" in self.__dict__:
            return self.block_grams.kinds
        return parameter_operations(self.objective, self.microbatches[0])

    @cached_property
    def gradients(self) -> Mapping[str, Tensor]:
        """Name to the gradient of the mean loss. Cost: one gradient, whose time is kept as the unit of all others."""
        self._synchronise()
        start = time.perf_counter()
        leaves = self.objective.leaves()
        found = gradients(self.objective.mean(self.microbatches, leaves), leaves)
        self._synchronise()
        self.gradient_seconds = time.perf_counter() - start
        return found

    def _synchronise(self) -> None:
        if self.objective.device.type == "cuda":
            torch.cuda.synchronize(self.objective.device)

    def hessian(self, names: Iterable[str] | None = None) -> HessianOperator:
        """The Hessian of the mean loss, restricted to the named parameters.

        Raises:
            RefusedError: the model's attention has no second derivative.
        """
        obstacle = second_order_obstacle(self.model)
        if obstacle:
            raise RefusedError(obstacle)
        return HessianOperator(self.objective, self.microbatches, names)
