"""ProbeGrams: Grams and Kronecker factors of one probe, each computed once for all measurements that ask."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import final

import torch

from curvature_callbacks.errors import LinAlgError
from curvature_callbacks.gram.block_grams import block_grams
from curvature_callbacks.gram.capture.interception import Capture
from curvature_callbacks.gram.context import GramContext, GramOptions
from curvature_callbacks.gram.passed import merged
from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.gram.storage import memory_budget as budget_of
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.linalg.kronecker import LayerKronecker
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.blocks import Blocks
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.model.loss.sharing import Sharing

_logger = logging.getLogger("curvature_callbacks")


@final
class ProbeGrams:
    """`grams(fisher_type)`: block Grams of one probe, kept for every measurement that asks for the same.

    Args:
        context: the loss, the processes, and what earlier probes of the run established.
        microbatches: what N spans.
        blocks: name to parameters.
        sharing: types of Fisher whose Grams are to come with Kronecker factors, and how positions enter these.
    """

    def __init__(
        self,
        context: GramContext,
        microbatches: Sequence[Microbatch],
        blocks: Blocks,
        *,
        sharing: Mapping[FisherType, Sharing],
    ) -> None:
        self._context = context
        self._microbatches = microbatches
        self._blocks = blocks
        self._sharing = dict(sharing)
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
        options = GramOptions(
            fisher_type=fisher_type,
            max_params_per_block=max_params_per_block,
            budget=budget_of(self._context.objective.device, memory_budget),
        )
        key = _key(options)
        if key not in self._grams:
            sharing = self._sharing.get(fisher_type) if max_params_per_block is None else None
            if sharing is not None and (fisher_type, sharing) not in self._kronecker:
                self._try_with_factors(replace(options, sharing=sharing))
            if key not in self._grams:
                self._grams[key] = self._computed(options)
        return self._grams[key]

    def kronecker(self, fisher_type: FisherType, *, sharing: Sharing) -> Mapping[str, LayerKronecker]:
        """Weight to the Kronecker factors of its layer, in the order of the model.

        They come from the pass that gives the Grams, where `sharing` announced them before it or no Gram was asked
        for yet; otherwise the pass is made again.
        """
        key = fisher_type, sharing
        if key not in self._kronecker:
            options = GramOptions(fisher_type=fisher_type, sharing=sharing)
            grams = self._computed(options)
            self._kronecker[key] = self._ordered(grams.kronecker)
            self._grams.setdefault(_key(options), grams)
        return self._kronecker[key]

    @cached_property
    def operations(self) -> Mapping[str, list[Operation]]:
        """Parameter to the operations that use it. Cost: nothing beside the Grams, else one forward pass."""
        for grams in self._grams.values():
            if all(name in grams.operations for name in grams.fallback):  # what earlier probes refused is not watched any more
                return grams.operations
        return _watched_operations(self._context, self._microbatches[0])

    def _try_with_factors(self, options: GramOptions) -> None:
        """Grams and factors in one pass; neither where there can be no factors: who asks for them meets the cause then."""
        assert options.sharing is not None
        try:
            with self._context.world.together():
                grams = self._computed(options)
        except (torch.OutOfMemoryError, LinAlgError) as error:
            _logger.debug("no Kronecker factors at this probe, its Grams are tried without: %s", error)
            return
        self._grams[_key(options)] = grams
        self._kronecker[options.fisher_type, options.sharing] = self._ordered(grams.kronecker)

    def _computed(self, options: GramOptions) -> BlockGrams:
        return block_grams(self._context, self._microbatches, self._blocks, options)

    def _ordered(self, layers: Mapping[str, LayerKronecker]) -> dict[str, LayerKronecker]:
        """`layers` in the order of the model's parameters; the backward pass completes them in another."""
        return {name: layers[name] for name in self._context.objective.parameters if name in layers}


def _key(options: GramOptions) -> tuple[FisherType, int | None, bool]:
    """What Grams are kept by: with deterministic algorithms their last bits may differ, so that mode is part of it."""
    return options.fisher_type, options.max_params_per_block, torch.are_deterministic_algorithms_enabled()


def _watched_operations(context: GramContext, batch: Microbatch) -> Mapping[str, list[Operation]]:
    """Parameter to the operations that use it, on any process, from one forward pass."""
    objective, world = context.objective, context.world
    with world.together():
        values = {name: parameter.detach() for name, parameter in objective.parameters.items()}
        unsharded = objective.unsharded_parameters
        capture = Capture(
            {name: values[name] for name in unsharded},
            batch.num_rows,
            unruled={},
            constants=objective.constants(),
            sharded=values.keys() - unsharded.keys(),
        )
        with capture:
            objective(batch, values, watch=capture)
    return merged(world.gathered(dict(capture.operations)))
