"""ProbeGrams: Grams and Kronecker factors of one probe, each computed once for all measurements that ask."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, final

import torch

from curvature_callbacks.errors import LinAlgError
from curvature_callbacks.gram.block_grams import BlockGrams, GramOptions, block_grams, parameter_operations
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.storage import memory_budget
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.linalg.kronecker import LayerKronecker
from curvature_callbacks.model.blocks import Blocks
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.processes.world import SINGLE, World

_logger = logging.getLogger("curvature_callbacks")


@final
class ProbeGrams:
    """`grams(fisher_type)`: block Grams of one probe, kept for every measurement that asks for the same.

    Args:
        objective: the loss of a microbatch.
        microbatches: what N spans.
        blocks: name to parameters.
        memory: what earlier probes of the run found out; updated.
        seed: of every draw.
        sharing: types of Fisher whose Grams are to come with Kronecker factors, and how positions enter these.
        world: the processes whose microbatches N spans.
    """

    def __init__(
        self,
        objective: Objective,
        microbatches: Sequence[Any],
        blocks: Blocks,
        *,
        memory: GramMemory,
        seed: int,
        sharing: Mapping[FisherType, Sharing],
        world: World = SINGLE,
    ) -> None:
        self._objective = objective
        self._microbatches = microbatches
        self._blocks = blocks
        self._memory = memory
        self._seed = seed
        self._sharing = dict(sharing)
        self._world = world
        self._grams: dict[tuple[FisherType, int | None, bool], BlockGrams] = {}
        self._kronecker: dict[tuple[FisherType, Sharing], Mapping[str, LayerKronecker]] = {}

    def __call__(
        self, fisher_type: FisherType = EMPIRICAL, *, max_params_per_block: int | None = None, memory_budget: int | None = None
    ) -> BlockGrams:
        """Grams of all blocks for a type of Fisher; see `gram.block_grams.block_grams`.

        Args:
            fisher_type: of the Grams.
            max_params_per_block: count a random part of larger blocks only.
            memory_budget: bytes on the device for the factors of earlier passes; default see `gram.storage.memory_budget`.
        """
        key = self._key(fisher_type, max_params_per_block)
        if key not in self._grams:
            sharing = self._sharing.get(fisher_type) if max_params_per_block is None else None
            if sharing is not None and (fisher_type, sharing) not in self._kronecker:
                self._with_factors(fisher_type, sharing, memory_budget)
            if key not in self._grams:
                self._grams[key] = self._block_grams(fisher_type, max_params_per_block, None, memory_budget)
        return self._grams[key]

    def kronecker(self, fisher_type: FisherType, *, sharing: Sharing) -> Mapping[str, LayerKronecker]:
        """Weight to the Kronecker factors of its layer, in the order of the model.

        They come from the pass that gives the Grams, where `sharing` announced them before it or no Gram was asked
        for yet; otherwise the pass is made again.
        """
        key = fisher_type, sharing
        if key not in self._kronecker:
            grams = self._block_grams(fisher_type, None, sharing, None)
            self._kronecker[key] = self._ordered(grams.kronecker)
            self._grams.setdefault(self._key(fisher_type, None), grams)
        return self._kronecker[key]

    def _with_factors(self, fisher_type: FisherType, sharing: Sharing, device_bytes: int | None) -> None:
        """Grams and factors in one pass; neither where there can be no factors: who asks for them meets the cause then."""
        try:
            with self._world.together():
                grams = self._block_grams(fisher_type, None, sharing, device_bytes)
        except (torch.OutOfMemoryError, LinAlgError) as error:
            _logger.debug("no Kronecker factors at this probe, its Grams are tried without: %s", error)
            return
        self._grams[self._key(fisher_type, None)] = grams
        self._kronecker[fisher_type, sharing] = self._ordered(grams.kronecker)

    def _ordered(self, layers: Mapping[str, LayerKronecker]) -> dict[str, LayerKronecker]:
        """In the model's order, not that in which the backward pass met them."""
        return {name: layers[name] for name in self._objective.parameters if name in layers}

    def _key(self, fisher_type: FisherType, max_params_per_block: int | None) -> tuple[FisherType, int | None, bool]:
        """Numbers of deterministic algorithms may differ in the last bits from those of others."""
        return fisher_type, max_params_per_block, torch.are_deterministic_algorithms_enabled()

    def _block_grams(
        self, fisher_type: FisherType, max_params_per_block: int | None, sharing: Sharing | None, device_bytes: int | None
    ) -> BlockGrams:
        options = GramOptions(
            kind=fisher_type,
            max_params_per_block=max_params_per_block,
            sharing=sharing,
            budget=memory_budget(self._objective.device, device_bytes),
        )
        return block_grams(
            self._objective,
            self._microbatches,
            self._blocks,
            memory=self._memory,
            seed=self._seed,
            options=options,
            world=self._world,
        )

    @cached_property
    def operations(self) -> Mapping[str, list[Operation]]:
        """Parameter to the operations that use it. Cost: nothing beside `grams`, else one forward pass."""
        for found in self._grams.values():
            if all(name in found.operations for name in found.fallback):  # what earlier probes refused is not watched any more
                return found.operations
        return parameter_operations(self._objective, self._microbatches[0], world=self._world)
