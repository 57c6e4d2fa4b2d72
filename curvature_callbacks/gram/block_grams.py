"""Block Grams: `G_b G_b'` of the per-sample gradients of every block, for all samples of a probe.

A probe makes *attempts*; each runs all passes (in rounds, see `gram.passes`) and gives the Gram of every parameter:

    attempt:  passes -> Gram of each parameter; those without a valid rule row by row
       |
       +-- layout proved at an earlier probe ---------------------------------------------------> sums of blocks
       +-- a row is not finite -> restrict the microbatches to the finite rows -----> next attempt
       |                          (all are, only the batch overflows: all parameters row by row)
       +-- a certificate failed -> read the parameter sequence-first, then row by row --> next attempt
       +-- every certificate passes: remember the layout ---------------------------------------> sums of blocks

What makes the next attempt different is kept in the run's `GramMemory`, so that later probes begin with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.errors import ProbeError, RefusedError
from curvature_callbacks.gram.certificate import certificate_errors, signature
from curvature_callbacks.gram.collector import Collector
from curvature_callbacks.gram.context import GramContext, GramOptions
from curvature_callbacks.gram.exchange import Exchange
from curvature_callbacks.gram.memory import Signature
from curvature_callbacks.gram.passed import Observed, Passed, pseudo_samples
from curvature_callbacks.gram.passes import run_passes
from curvature_callbacks.gram.result import BlockGrams, among_all_rows, block_sizes, without_finite_rows
from curvature_callbacks.gram.row_by_row import FiniteRows, check_apart, finite_rows, row_grams
from curvature_callbacks.gram.storage import Storage, memory_budget
from curvature_callbacks.gram.subsample import chosen_slices
from curvature_callbacks.linalg.accumulate import finite_samples
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.blocks import Blocks
from curvature_callbacks.model.objective import Objective


def block_grams(context: GramContext, microbatches: Sequence[Microbatch], blocks: Blocks, options: GramOptions) -> BlockGrams:
    """Exact Grams of all blocks without the S x P matrix of gradients.

    One forward pass per microbatch and one backward pass per surrogate record inputs and output gradients of every operation
    with a rule; the others' parameters take one gradient per row. Grams of a layout not met before are proved by random
    weights, parameter by parameter; one that fails is read sequence-first, then computed again row by row.

    Args:
        context: the loss, the processes, and what earlier probes established, which is updated.
        microbatches: of this process; N spans those of all processes, and cross terms between them are exact.
        blocks: parameter groups.
        options: which Grams.

    Returns:
        The Grams. Rows and columns of a row without a finite gradient are not finite, or left out where S is not N.

    Raises:
        RefusedError: samples are coupled, or no path gives a Gram that passes the certificate.

    Cost: see `compute_fisher_spectrum`; one gradient more where the layout is not certified yet; N single-row gradients for
    parameters without a rule. Memory: see `compute_fisher_spectrum`.
    """
    objective = context.objective
    if context.refusal:
        raise RefusedError(context.refusal)
    if objective.is_sharded and options.max_params_per_block is not None:
        raise RefusedError("`max_params_per_block` needs unsharded parameters, and these take too much of the free memory.")
    slices = chosen_slices(objective.parameters, blocks, options.max_params_per_block, seed=context.seed)
    finite: FiniteRows | None = None  # where rows were left out
    error: float | None = None
    refused: Mapping[str, str] = {}  # at this probe, beside those that the memory refuses
    # Every attempt but the last moves a parameter on (twice each), leaves rows out (once) or gives all rules up (once).
    for _ in range(2 * len(objective.parameters) + 3):
        attempt = _attempt(context, microbatches, slices, options, refused)
        if attempt.layout in context.memory.certified:
            break
        if not finite_samples(attempt.grams).all():
            rows = finite_rows(context, microbatches)
            if not rows.of_all.any():
                return without_finite_rows(objective, blocks, len(rows.of_all), attempt.fallback)
            if rows.of_all.all():
                refused = _all_others(objective, attempt.fallback)
            else:
                finite, microbatches = rows, rows.restricted(microbatches)
            continue
        errors = _certificate_errors(context, attempt)
        if not context.memory.judge(errors, attempt.fallback):
            error = max(errors.values(), default=None)
            if max(attempt.observed.sizes) > 1:  # with one row every axis passes for the sample
                context.memory.certified.add(attempt.layout)
            break
    else:
        raise AssertionError("an attempt changed nothing")
    result = _result(context, attempt, blocks, error)
    return result if finite is None else among_all_rows(result, finite.of_all, options.fisher_type, objective.device)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Attempt:
    """All passes once, and the Gram of every parameter.

    Attributes:
        passed: the passes of this process.
        observed: the passes of all processes.
        collector: Grams and factors of the parameters with a rule.
        fallback: parameter to why it was taken row by row.
        grams: parameter to its Gram (S, S), of those too.
        layout: what a certificate proves.
        mode: see `Storage.mode`; that of the process that had to store most.
    """

    passed: Passed
    observed: Observed
    collector: Collector
    fallback: Mapping[str, str]
    grams: Mapping[str, Tensor]
    layout: Signature
    mode: str


def _attempt(
    context: GramContext,
    microbatches: Sequence[Microbatch],
    slices: Mapping[str, Tensor],
    options: GramOptions,
    refused: Mapping[str, str],
) -> _Attempt:
    objective, world = context.objective, context.world
    collector = Collector(context, options, slices)
    exchange = None if world.size == 1 else Exchange(context, collector)
    form = context.limits.kept_form if options.sharing is None else "factors"
    storage = Storage(options.budget or memory_budget(objective.device), form=form, device=objective.device)
    try:
        with world.together():
            passed = run_passes(
                context,
                microbatches,
                options.fisher_type,
                storage,
                unruled={**context.memory.refused, **refused},
                consume=collector.consume,
                finish=None if exchange is None else exchange.finish,
            )
    finally:
        context.memory.scratch.forget()
    observed = passed.observed if exchange is None or exchange.observed is None else exchange.observed
    mode = max(world.gathered(storage.mode), key=lambda mode: (len(mode), mode))
    fallback = _fallback(objective, {**passed.unruled, **collector.without_gram})
    grams = {name: gram for name, gram in collector.grams.items() if name not in fallback}
    grams |= row_grams(context, passed, sorted(fallback))
    return _Attempt(
        passed=passed,
        observed=observed,
        collector=collector,
        fallback=fallback,
        grams=grams,
        layout=signature(observed.operations, observed.positions),
        mode=mode,
    )


def _fallback(objective: Objective, unruled: Mapping[str, str]) -> dict[str, str]:
    """The `unruled` parameters that are measured, each with its reason; raises a `RefusedError` where one is sharded."""
    fallback = {name: reason for name, reason in unruled.items() if name in objective.parameters}
    if objective.is_sharded:
        for name, reason in fallback.items():
            raise RefusedError(
                f"`{name}` has no rule ({reason}) and is sharded: its gradients cannot be taken row by row. Leave it out by "
                "`params_filter`."
            )
    return fallback


def _certificate_errors(context: GramContext, attempt: _Attempt) -> dict[str, float]:
    """Parameter to its certificate's error; raises a `RefusedError` where rows are coupled."""
    with context.world.together():
        for batch in attempt.passed.microbatches:
            check_apart(context.objective, batch)
    slices = {name: slices for name, slices in attempt.collector.counted_slices.items() if name not in attempt.fallback}
    return certificate_errors(context, attempt.passed, attempt.grams, slices)


def _all_others(objective: Objective, fallback: Mapping[str, str]) -> dict[str, str]:
    """Every other parameter to why it is taken row by row at this probe: the batch overflows though no row does."""
    others = [name for name in objective.parameters if name not in fallback]
    if not others:
        raise ProbeError("the inner products of this probe's gradients are not finite, though the gradients are.")
    return dict.fromkeys(others, "not finite in the batch")


def _result(context: GramContext, attempt: _Attempt, blocks: Blocks, error: float | None) -> BlockGrams:
    """Sums over the blocks, of the active pseudo-samples; `error`: of the certificate, where it was run."""
    samples, weights, active = pseudo_samples(attempt.passed, context.world)
    totals = {block: _block_gram(attempt.grams, names, context.objective.device) for block, names in blocks.items()}
    layers = attempt.collector.kronecker(attempt.grams, attempt.observed)
    return BlockGrams(
        grams={block: _active_part(K, active) for block, K in totals.items()},
        sizes=block_sizes(context.objective, blocks),
        dtype=context.objective.dtype,
        samples=samples[active],
        weights=weights[active],
        num_targets=torch.cat(list(attempt.observed.num_targets)),
        operations=attempt.observed.operations,
        fallback=attempt.fallback,
        failed_certificates=tuple(name for name in attempt.fallback if name in context.memory.failed),
        certificate_error=error,
        kronecker={name: replace(layer, gram=_active_part(layer.gram, active)) for name, layer in layers.items()},
        mode=attempt.mode,
    )


def _active_part(K: Tensor, active: Tensor) -> Tensor:
    if active.all():
        return K
    active = active.to(K.device)
    return K[active][:, active]


def _block_gram(grams: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> Tensor:
    total = grams[names[0]].to(device)
    for name in names[1:]:
        total = total + grams[name].to(device)
    return total
