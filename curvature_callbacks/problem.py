"""Problem: model, blocks, loss and microbatches of one probe; what measurements share is built once."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from curvature_callbacks.batches import to_device
from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError
from curvature_callbacks.gram.engine import BlockGrams, GramOptions, block_grams, parameter_operations
from curvature_callbacks.gram.kronecker import LayerKronecker
from curvature_callbacks.gram.positions import Sharing
from curvature_callbacks.gram.storage import memory_budget
from curvature_callbacks.gram.trust import Trust
from curvature_callbacks.linalg.spectrum import LinAlgError
from curvature_callbacks.model.blocks import Blocks, BlockStructure, group_blocks
from curvature_callbacks.model.checks import check_model, second_order_obstacle
from curvature_callbacks.model.losses import Loss, resolve_loss
from curvature_callbacks.model.objective import Objective, ParamsFilter, gradients
from curvature_callbacks.model.stability import Optimizers, Stability, read_stability
from curvature_callbacks.model.surrogates import EMPIRICAL, FisherType, SampleUnit, surrogates
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator
from curvature_callbacks.operators.hessian import HessianOperator
from curvature_callbacks.operators.preconditioned import PreconditionedOperator

_logger = logging.getLogger("curvature_callbacks")


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
        trust: what earlier probes of the run, with the same loss and block structure, found out; updated.
        sharing: types of Fisher whose Grams are to come with Kronecker factors, and how positions enter these.
        optimizer: what trains the model, or several of them; only read.

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
        sharing: Mapping[FisherType, Sharing] | None = None,
        optimizer: Optimizers | None = None,
    ) -> None:
        if not microbatches:
            raise ConfigurationError("`batches` must hold at least one microbatch, got none.")
        check_model(model)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.model = model
        self.microbatches = [to_device(batch, device) for batch in microbatches]
        self.seed = seed
        self.step = step
        self.optimizer = optimizer
        self._trust = Trust() if trust is None else trust
        if self._trust.loss is None:
            self._trust.loss = resolve_loss(loss, self.microbatches[0])
        self.objective = Objective(model, self._trust.loss, params_filter=params_filter)
        names = tuple(self.objective.parameters)
        if self._trust.blocks is None or self._trust.blocks[0] != names:
            self._trust.blocks = names, group_blocks(model, names, block_structure)
        self.blocks: Blocks = self._trust.blocks[1]
        self.gradient_seconds = 0.0  # wall time of one gradient, once `gradients` was asked for
        self._sharing = dict(sharing or {})
        self._grams: dict[tuple[FisherType, int | None, bool], BlockGrams] = {}
        self._kronecker: dict[tuple[FisherType, Sharing], Mapping[str, LayerKronecker]] = {}

    def check(self, kinds: Sequence[FisherType] = ()) -> None:
        """Raise a `ConfigurationError` when no sample has a valid target, or the loss has not one of these types of Fisher.

        Cost: one forward pass.
        """
        valid = 0
        with torch.no_grad():
            for batch in self.microbatches:
                losses = self.objective(batch)
                valid += int(losses.num_targets.sum())
                for kind in kinds:
                    if kind != EMPIRICAL:  # which every loss has
                        surrogates(kind, losses, seed=self.seed)
        if valid == 0:
            raise ConfigurationError(
                "every label of the drawn microbatches is ignored (-100): the loss is undefined. Check the collator and the "
                "labels, or give probe data of its own."
            )

    def grams(
        self, kind: FisherType = EMPIRICAL, *, max_params_per_block: int | None = None, memory_budget: int | None = None
    ) -> BlockGrams:
        """Grams of all blocks for a type of Fisher; see `gram.engine.block_grams`. Kept for the next who asks the same.

        Args:
            kind: type of Fisher.
            max_params_per_block: count a random part of larger blocks only.
            memory_budget: bytes on the device for the factors of earlier passes; default see `gram.storage.memory_budget`.
        """
        key = self._key(kind, max_params_per_block)
        if key not in self._grams:
            sharing = self._sharing.get(kind) if max_params_per_block is None else None
            if sharing is not None and (kind, sharing) not in self._kronecker:
                self._with_factors(kind, sharing, memory_budget)
            if key not in self._grams:
                self._grams[key] = self._block_grams(kind, max_params_per_block, None, memory_budget)
        return self._grams[key]

    def kronecker(self, kind: FisherType, *, sharing: Sharing) -> Mapping[str, LayerKronecker]:
        """Weight to the Kronecker factors of its layer, in the order of the model.

        They come from the pass that gives the Grams, where `sharing` announced them before it or no Gram was asked
        for yet; otherwise the pass is made again.
        """
        key = kind, sharing
        if key not in self._kronecker:
            grams = self._block_grams(kind, None, sharing, None)
            self._kronecker[key] = self._ordered(grams.kronecker)
            self._grams.setdefault(self._key(kind, None), grams)
        return self._kronecker[key]

    def _with_factors(self, kind: FisherType, sharing: Sharing, memory: int | None) -> None:
        """Grams and factors in one pass; neither where there can be no factors: who asks for them meets the cause then."""
        try:
            grams = self._block_grams(kind, None, sharing, memory)
        except (torch.OutOfMemoryError, LinAlgError) as error:
            _logger.debug("no Kronecker factors at this probe, its Grams are tried without: %s", error)
            return
        self._grams[self._key(kind, None)] = grams
        self._kronecker[kind, sharing] = self._ordered(grams.kronecker)

    def _ordered(self, layers: Mapping[str, LayerKronecker]) -> dict[str, LayerKronecker]:
        """In the model's order, not that in which the backward pass met them."""
        return {name: layers[name] for name in self.objective.parameters if name in layers}

    def _key(self, kind: FisherType, max_params_per_block: int | None) -> tuple[FisherType, int | None, bool]:
        """Numbers of deterministic algorithms may differ in the last bits from those of others."""
        return kind, max_params_per_block, torch.are_deterministic_algorithms_enabled()

    def _block_grams(
        self, kind: FisherType, max_params_per_block: int | None, sharing: Sharing | None, memory: int | None
    ) -> BlockGrams:
        options = GramOptions(
            kind=kind,
            max_params_per_block=max_params_per_block,
            sharing=sharing,
            budget=memory_budget(self.objective.device, memory),
        )
        return block_grams(self.objective, self.microbatches, self.blocks, trust=self._trust, seed=self.seed, options=options)

    @property
    def block_grams(self) -> BlockGrams:
        """`grams()`: of the empirical Fisher over sequences."""
        return self.grams()

    @cached_property
    def operations(self) -> Mapping[str, list[str]]:
        """Parameter to the operations that use it. Cost: nothing beside `grams`, else one forward pass."""
        for found in self._grams.values():
            if all(name in found.kinds for name in found.fallback):  # what earlier probes refused is not watched any more
                return found.kinds
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

    def stability(self, names: Iterable[str] | None = None) -> Stability:
        """Where the optimizer's next step of the named parameters is stable; see `read_stability`.

        Raises:
            ConfigurationError: the problem has no optimizer, or one of other parameters.
            RefusedError: the optimizer's update is not known.
        """
        if self.optimizer is None:
            raise ConfigurationError(
                "`optimizer` is needed for its preconditioner, got None: pass the one that trains the model."
            )
        named = dict(self.model.named_parameters())
        wanted = self.objective.parameters if names is None else names
        return read_stability(self.optimizer, {name: named[name] for name in wanted}, dtype=self.objective.dtype)

    def preconditioned_hessian(self, names: Iterable[str] | None = None) -> PreconditionedOperator:
        """`P^-1/2 H P^-1/2`, P the preconditioner of the optimizer's latest step; of those named parameters that it moves.

        Raises:
            ConfigurationError, RefusedError: as `stability` and `hessian`.
            ProbeError: none of them moves yet.
        """
        stability = self.stability(names)
        if stability.preconditioner is None:
            raise ProbeError(f"there is no preconditioned Hessian: {stability.reason}")
        return PreconditionedOperator(self.hessian(stability.names), 1 / stability.preconditioner)

    def empirical_fisher(
        self, names: Iterable[str] | None = None, *, sample_unit: SampleUnit = "sequence"
    ) -> EmpiricalFisherOperator:
        """The empirical Fisher of all microbatches, restricted to the named parameters.

        Raises:
            ConfigurationError: the losses of single rows (`token`: of single targets) are not known.
            RefusedError: the model's attention has no second derivative, which products with J take as well.
        """
        obstacle = second_order_obstacle(self.model)
        if obstacle:
            raise RefusedError(obstacle)
        return EmpiricalFisherOperator(self.objective, self.microbatches, names, sample_unit=sample_unit)
