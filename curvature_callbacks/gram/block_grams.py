"""Block Grams: `G_b G_b'` of the per-sample gradients of every block, for all samples of a probe."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.errors import ProbeError, RefusedError
from curvature_callbacks.gram.capture.interception import Capture
from curvature_callbacks.gram.certificate import certificate_errors, signature
from curvature_callbacks.gram.collector import Collector
from curvature_callbacks.gram.exchange import Exchange
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.passes import Passed, pseudo_samples, run_passes
from curvature_callbacks.gram.row_by_row import check_apart, finite_rows, row_grams
from curvature_callbacks.gram.storage import MemoryBudget, Storage, memory_budget
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.linalg.accumulate import finite_samples
from curvature_callbacks.linalg.kronecker import LayerKronecker
from curvature_callbacks.model.blocks import Blocks
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.processes.world import SINGLE, World


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GramOptions:
    """What to compute.

    Attributes:
        kind: type of Fisher.
        max_params_per_block: count a random part of each larger block only, its Gram scaled up to all of it.
        sharing: compute Kronecker factors too, with this treatment of positions.
        budget: bytes for the factors of earlier passes; default see `memory_budget`.
    """

    kind: FisherType = EMPIRICAL
    max_params_per_block: int | None = None
    sharing: Sharing | None = None
    budget: MemoryBudget | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockGrams:
    """Grams of one probe over S pseudo-samples; S = N rows for the empirical Fisher over sequences.

    Attributes:
        grams: block to (S, S) float64, unscaled, `K_st = g~_s . g~_t`, see `FisherType`.
        samples: (S,) int64, the row of the probe each pseudo-sample belongs to.
        weights: (S,) float64, `g~_s = sqrt(weights_s) g_s` in the mean gradient.
        num_targets: (N,) valid targets of each row.
        operations: parameter to the operations that used it.
        fallback: parameter to why its gradients were taken row by row.
        certificate_error: largest relative error the certificate found over the parameters; None when it was not run.
        kronecker: weight to its layer's Kronecker factors; empty unless asked for.
        mode: where factors waited, see `Storage.mode`.
    """

    grams: Mapping[str, Tensor]
    samples: Tensor
    weights: Tensor
    num_targets: Tensor
    operations: Mapping[str, list[Operation]]
    fallback: Mapping[str, str]
    certificate_error: float | None
    kronecker: Mapping[str, LayerKronecker]
    mode: str


def block_grams(
    objective: Objective,
    microbatches: Sequence[Any],
    blocks: Blocks,
    *,
    memory: GramMemory,
    seed: int,
    options: GramOptions = GramOptions(),
    world: World = SINGLE,
) -> BlockGrams:
    """Exact Grams of all blocks without the S x P matrix of gradients.

    One forward pass per microbatch and one backward pass per surrogate record inputs and output gradients of every operation
    with a rule; the others' parameters take one gradient per row. Grams of a layout not met before are proved by random
    weights, parameter by parameter; one that fails is read sequence-first, then computed again row by row.

    Args:
        objective: the loss of a microbatch.
        microbatches: what N spans; cross terms between them are exact.
        blocks: parameter groups.
        memory: carried from probe to probe, updated here.
        seed: seed of draws, of the certificate's weights and of subsampled parameters.
        options: what to compute.
        world: the processes whose microbatches N spans too, by rank.

    Returns:
        The Grams. Rows and columns of a row without a finite gradient are not finite, or left out where S is not N.

    Raises:
        RefusedError: samples are coupled, or no path gives a Gram that passes the certificate.

    Cost: see `compute_fisher_spectrum`; one gradient more where the layout is not certified yet; N single-row gradients for
    parameters without a rule. Memory: see `compute_fisher_spectrum`.
    """
    if objective.is_sharded and options.max_params_per_block is not None:
        raise RefusedError("`max_params_per_block` needs whole parameters, and these take too much of the free memory.")
    rows = chosen_rows(objective.parameters, blocks, options.max_params_per_block, seed=seed)
    local, passed, collector = _passed(objective, microbatches, rows, memory, seed, options, world)
    fallback = {name: reason for name, reason in passed.unruled.items() if name in objective.parameters}
    if objective.is_sharded and fallback:
        name, reason = next(iter(fallback.items()))
        raise RefusedError(
            f"`{name}` has no rule ({reason}) and is sharded: its gradients cannot be taken row by row. Leave it out by "
            "`params_filter`."
        )
    grams = {name: gram for name, gram in collector.grams.items() if name not in fallback}
    grams |= row_grams(objective, local.microbatches, sorted(fallback), local.surrogates, world=world)
    layout = signature(passed.operations, passed.positions)
    errors: dict[str, float] = {}
    if layout not in memory.certified:
        again: dict[str, Any] = {"memory": memory, "seed": seed, "options": options, "world": world}
        if not finite_samples(grams).all():
            if objective.is_sharded:
                raise ProbeError("a row has no finite gradient, and single rows of sharded parameters cannot be looked at.")
            return _of_finite_rows(objective, microbatches, blocks, fallback, **again)
        with world.together():
            for batch in local.microbatches:
                check_apart(objective, batch)
        rows = {name: found for name, found in collector.counted.items() if name not in fallback}
        errors = certificate_errors(objective, local.microbatches, grams, local.surrogates, rows, seed=seed, world=world)
        if memory.judge(errors, fallback):
            return block_grams(objective, microbatches, blocks, **again)
        if max(passed.sizes) > 1:  # with one row every axis passes for the sample
            memory.certified.add(layout)
    samples, weights, active = pseudo_samples(local, world)
    found = {block: _sum(grams, names, objective.device) for block, names in blocks.items()}
    return BlockGrams(
        grams={block: _picked(K, active) for block, K in found.items()},
        samples=samples[active],
        weights=weights[active],
        num_targets=torch.cat(passed.num_targets),
        operations=passed.operations,
        fallback=fallback,
        certificate_error=max(errors.values(), default=None),
        kronecker={
            name: replace(layer, gram=_picked(layer.gram, active)) for name, layer in collector.kronecker(grams).items()
        },
        mode=passed.mode,
    )


def _passed(
    objective: Objective,
    microbatches: Sequence[Any],
    rows: Mapping[str, Tensor],
    memory: GramMemory,
    seed: int,
    options: GramOptions,
    world: World,
) -> tuple[Passed, Passed, Collector]:
    """What the passes of this process and those of all found out, and what is kept of the parameters."""
    local = Passed(dict(memory.refused))
    whole = local if world.size == 1 else Passed(dict(memory.refused))
    collector = Collector(whole, rows, options.kind, options.sharing, memory.scratch)
    exchange = Exchange(world, local, whole, collector, sizes=objective.sizes, device=objective.device)
    storage = Storage(
        options.budget or memory_budget(objective.device), factors_wanted=options.sharing is not None, device=objective.device
    )
    finish = None if world.size == 1 else exchange.finish
    run: dict[str, Any] = {"seed": world.seed(seed), "storage": storage, "finish": finish}
    try:
        with world.together():
            run_passes(objective, microbatches, collector.consume, local, options.kind, memory, **run)
    finally:
        memory.scratch.forget()
    exchange.record_storage_mode()
    return local, whole, collector


def parameter_operations(objective: Objective, batch: Any, *, world: World = SINGLE) -> Mapping[str, list[Operation]]:
    """Parameter to the operations that use it, on any process, from one forward pass. Cost: that pass."""
    with world.together():
        values = {name: parameter.detach() for name, parameter in objective.parameters.items()}
        here = objective.unsharded
        capture = Capture(
            {name: values[name] for name in here},
            batch_size(batch),
            unruled={},
            constants=objective.constants(),
            sharded=values.keys() - here.keys(),
        )
        with capture:
            objective(batch, values, watch=capture)
    found: dict[str, list[Operation]] = {}
    for operations in world.gathered(dict(capture.operations)):
        for name, used in operations.items():
            found.setdefault(name, []).extend(used)
    return found


def _picked(K: Tensor, active: Tensor) -> Tensor:
    if active.all():
        return K
    active = active.to(K.device)
    return K[active][:, active]


def _sum(grams: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> Tensor:
    total = grams[names[0]].to(device)
    for name in names[1:]:
        total = total + grams[name].to(device)
    return total


def _of_finite_rows(
    objective: Objective,
    microbatches: Sequence[Any],
    blocks: Blocks,
    fallback: Mapping[str, str],
    *,
    memory: GramMemory,
    seed: int,
    options: GramOptions,
    world: World,
) -> BlockGrams:
    """The Grams of the rows with a finite gradient, in their places where pseudo-samples are rows.

    Which rows these are is found row by row: in a layout that is not proved yet one bad row may look like all of them.
    """
    with world.together():
        own = [finite_rows(objective, batch) for batch in microbatches]
    usable = torch.cat([piece for pieces in world.gathered(own) for piece in pieces])
    if usable.all() and len(fallback) == len(objective.parameters):
        raise ProbeError("the inner products of this probe's gradients are not finite, though the gradients are.")
    if usable.all():  # only the batch overflows: no rule can be relied on at this probe
        refused = memory.refused | {name: "not finite in the batch" for name in objective.parameters if name not in fallback}
        by_row = replace(memory, refused=refused)
        return block_grams(objective, microbatches, blocks, memory=by_row, seed=seed, options=options, world=world)
    unknown = torch.full((len(usable), len(usable)), torch.nan, dtype=torch.float64, device=objective.device)
    kept = [take_rows(batch, piece.nonzero()[:, 0]) for batch, piece in zip(microbatches, own, strict=True) if piece.any()]
    place = usable.nonzero()[:, 0]
    if not usable.any():
        return BlockGrams(
            grams=dict.fromkeys(blocks, unknown),
            samples=torch.arange(len(usable)),
            weights=torch.ones(len(usable), dtype=torch.float64),
            num_targets=torch.zeros(len(usable), dtype=torch.int64),
            operations={},
            fallback=fallback,
            certificate_error=None,
            kronecker={},
            mode="one pass",
        )
    inner = block_grams(objective, kept, blocks, memory=memory, seed=seed, options=options, world=world)
    targets = torch.zeros(len(usable), dtype=torch.int64).index_put((place,), inner.num_targets)
    if options.kind != EMPIRICAL:
        return replace(inner, samples=place[inner.samples], num_targets=targets)
    there = place[inner.samples].to(objective.device)
    grams = {block: unknown.index_put((there[:, None], there), K) for block, K in inner.grams.items()}
    weights = torch.ones(len(usable), dtype=torch.float64)
    return replace(inner, grams=grams, samples=torch.arange(len(usable)), weights=weights, num_targets=targets)


def chosen_rows(
    parameters: Mapping[str, Tensor], blocks: Blocks, max_params_per_block: int | None, *, seed: int
) -> dict[str, Tensor]:
    """Parameter to the sorted rows (indices of axis 0) that are counted, for those of blocks larger than allowed.

    Every parameter of such a block keeps the same share of its rows, at least one, so that each of its Grams scaled by all
    rows over counted rows is unbiased, and with them the trace of the block.
    """
    if max_params_per_block is None:
        return {}
    chosen: dict[str, Tensor] = {}
    for names in blocks.values():
        share = max_params_per_block / sum(parameters[name].numel() for name in names)
        for name in names if share < 1.0 else ():
            if parameters[name].ndim:
                chosen[name] = _rows(parameters[name], share, seed, name)
    return {name: rows for name, rows in chosen.items() if len(rows) < len(parameters[name])}


def _rows(parameter: Tensor, share: float, seed: int, name: str) -> Tensor:
    count = parameter.shape[0]
    own = int.from_bytes(hashlib.sha1(f"{seed} {name}".encode()).digest()[:8], "big") % 2**63
    order = torch.randperm(count, generator=torch.Generator().manual_seed(own))
    return order[: max(1, round(share * count))].sort().values.to(parameter.device)
