"""Per-sample gradients row by row: slow, exact, for any operation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError, is_out_of_memory, named
from curvature_callbacks.gram.context import GramContext
from curvature_callbacks.gram.passed import Passed
from curvature_callbacks.linalg.accumulate import gram
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.gradients import gradients
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.loss.surrogates import Surrogate
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.processes.group import is_agreed
from curvature_callbacks.processes.world import World

Part = tuple[str, int, int]  # elements start:stop of a flattened parameter

_COUPLING: Final = 1e-3  # relative disagreement of the sum over rows with the batch, beyond which samples are not separate


def row_grams(context: GramContext, passed: Passed, names: Sequence[str]) -> dict[str, Tensor]:
    """Name to the Gram (S, S) float64 of that parameter's per-sample gradients, by one forward pass a row.

    Args:
        context: the loss, the processes whose samples S counts too, and how many gradients are held at a time.
        passed: microbatches of this process and what their backward passes differentiate.
        names: parameters.

    Raises:
        RefusedError: the losses of single rows do not add up to the loss of the batch.

    Cost: N gradients of one row (and a further backward pass for each further surrogate), once per `GramLimits.row_bytes` (256
    MiB) of `S x P`; extra memory as much.
    """
    grams: dict[str, Tensor] = {}
    if not names:
        return grams
    objective, world = context.objective, context.world
    chosen = list(zip(passed.microbatches, passed.surrogates, strict=True))
    num_samples = sum(batch.num_rows * len(of_batch) for batch, of_batch in chosen)
    for group in _groups(objective, names, int(world.total(torch.tensor(num_samples))), context.limits.row_bytes):
        with world.together():
            rows = [
                row
                for batch, of_batch in chosen
                for row in _pass_major(_row_gradients(objective, batch, group, of_batch), len(of_batch))
            ]
        for number, (name, start, stop) in enumerate(group):
            nothing = objective.parameters[name].new_zeros(0, stop - start)
            K = gram_together(torch.stack([row[number] for row in rows]) if rows else nothing, world=world)
            grams[name] = grams[name] + K if name in grams else K
    return grams


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FiniteRows:
    """Which rows of a probe have a finite gradient.

    Attributes:
        local: for each microbatch of this process (rows,) bool.
        of_all: (N,) bool, the rows of all processes.
    """

    local: Sequence[Tensor]
    of_all: Tensor

    def restricted(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """The microbatches without the other rows, and without those that have none left."""
        pairs = zip(microbatches, self.local, strict=True)
        return [batch.take(flags.nonzero()[:, 0]) for batch, flags in pairs if flags.any()]


def finite_rows(context: GramContext, microbatches: Sequence[Microbatch]) -> FiniteRows:
    """Which rows have a finite gradient, by one gradient a row: a layout not yet proved may mix one bad row into all.

    Cost: N gradients of one row.
    """
    if context.objective.is_sharded:
        raise ProbeError("a row has no finite gradient, and single rows of sharded parameters cannot be looked at.")
    with context.world.together():
        local = [_are_finite(context.objective, batch) for batch in microbatches]
    of_all = torch.cat([flags for of_process in context.world.gathered(local) for flags in of_process])
    return FiniteRows(local=local, of_all=of_all)


def _are_finite(objective: Objective, batch: Microbatch) -> Tensor:
    """(N,) whether the gradient of a row's loss is finite. Cost: N gradients of one row."""
    leaves = objective.leaves()
    flags = []
    for row in batch.singles():
        of_row = gradients(_of_row(objective, row, leaves).total, leaves)
        flags.append(all(bool(gradient.isfinite().all()) for gradient in of_row.values()))
    return torch.tensor(flags)


def _groups(objective: Objective, names: Sequence[str], num_samples: int, limit: int) -> list[list[Part]]:
    """Parts of the parameters whose gradients for all samples fit in `limit` bytes together."""
    groups: list[list[Part]] = []
    held = limit
    for name in names:
        parameter = objective.parameters[name]
        width = max(1, limit // (num_samples * parameter.element_size()))
        for start in range(0, parameter.numel(), width):
            stop = min(start + width, parameter.numel())
            size = num_samples * (stop - start) * parameter.element_size()
            if not groups or held + size > limit:
                groups.append([])
                held = 0
            groups[-1].append((name, start, stop))
            held += size
    return groups


def _row_gradients(
    objective: Objective, batch: Microbatch, group: Sequence[Part], chosen: Sequence[Surrogate | None]
) -> list[list[Tensor]]:
    """For each row and surrogate the gradients of the group's parts."""
    leaves = objective.leaves(dict.fromkeys(name for name, _, _ in group))
    result, total = [], 0.0
    for index, row in enumerate(batch.singles()):
        losses = _of_row(objective, row, leaves)
        total += float(losses.total.detach())
        for number, surrogate in enumerate(chosen):
            loss = losses.total if surrogate is None else surrogate.restricted(torch.tensor([index]))(losses).sum()
            of_row = gradients(loss, leaves, again=number < len(chosen) - 1)
            result.append([of_row[name].flatten()[start:stop].clone() for name, start, stop in group])
    check_separable(objective, batch, total)
    return result


def _of_row(objective: Objective, row: Microbatch, leaves: Mapping[str, Tensor] | None = None) -> SampleLosses:
    """The loss of a row by itself, of a batch that has one."""
    try:
        return objective(row, leaves)
    except (ConfigurationError, ProbeError, RefusedError):
        raise
    except Exception as error:
        if is_agreed(error) or is_out_of_memory(error):
            raise
        raise RefusedError(
            f"rows cannot be taken apart: the loss of a batch can be computed and that of a row in it cannot ({named(error)}). "
            "Return one loss per row (`loss_fn`), or let the loss take a batch of a single row."
        ) from error


def _pass_major(rows: list[list[Tensor]], num_passes: int) -> list[list[Tensor]]:
    """`rows`, sorted by row and then pass, in the order of the hooked passes: by backward pass, then row."""
    return [rows[index] for number in range(num_passes) for index in range(number, len(rows), num_passes)]


def check_rows(objective: Objective, batch: Microbatch, losses: SampleLosses) -> None:
    """`check_separable` for the single rows of a batch with these losses: halves of a ragged one can balance by chance.

    Cost: one forward pass over the batch and one over each row.
    """
    if losses.coupled is not None:
        raise RefusedError(
            f"the loss has a part of all rows of a batch together ({losses.coupled}): samples are coupled and have no "
            "gradients of their own. Measure a loss without it (`output_router_logits`=False, or a loss function)."
        )
    with torch.no_grad():
        total = sum(float(_of_row(objective, row).total) for row in batch.singles())
    check_separable(objective, batch, total)


def check_apart(objective: Objective, batch: Microbatch) -> None:
    """Raise a `RefusedError` unless every row has the same loss among half of its companions.

    Random signs cannot see what rows take from each other without a gradient (a batch mean that is subtracted). Nothing is
    known of a microbatch that stays whole.

    Cost: two forward passes over the batch.
    """
    size = batch.num_rows
    with torch.no_grad():
        together = objective(batch).per_sample
        if together is None or size < 2 or batch.is_whole:
            return
        for rows in (torch.arange(0, size, 2), torch.arange(1, size, 2)):
            half = objective(batch.take(rows)).per_sample
            among_all = together[rows.to(together.device)]
            if half is None or bool(((half - among_all).abs() > _COUPLING * (among_all.abs() + together.abs().mean())).any()):
                reasons = _reasons(objective, "batch statistics", "a contrastive loss")
                raise RefusedError(f"the loss of a row depends on the other rows of its batch: {reasons}.")


def check_separable(objective: Objective, batch: Microbatch, total: float) -> None:
    """Raise a `RefusedError` unless `total`, summed over parts of `batch`, is the batch's own `sum_i l_i`."""
    with torch.no_grad():
        of_batch = float(objective(batch).total)
    if abs(total - of_batch) > _COUPLING * abs(of_batch):
        raise RefusedError(
            f"the losses of single rows add up to {total:.6g}, the batch's to {of_batch:.6g}: "
            f"{_reasons(objective, 'a batch-wide loss', 'a mean over ragged targets')}. Pass a loss function that returns one "
            "loss per row."
        )


def _reasons(objective: Objective, *usual: str) -> str:
    """What it says of rows that their losses are not their own."""
    drawn = ("random numbers that do not belong to single rows",) if objective.draws.is_random else ()
    return f"samples are coupled ({', '.join((*usual, *drawn))}) and have no gradients of their own"


def gram_together(rows: Tensor, *, world: World) -> Tensor:
    """`R R'` (S, S) float64, R the `rows` (S_r, p) of all processes one below the other.

    Each process takes a part of the columns.

    Cost: all but a W-th of `rows` travels, and a sum of S x S numbers.
    """
    if world.size == 1:
        return gram(rows)
    counts = world.gathered(len(rows))
    width = -(-rows.shape[1] // world.size)
    ends = [min(width * rank, rows.shape[1]) for rank in range(world.size + 1)]
    parcels = [[rows[:, start:end]] for start, end in pairwise(ends)]
    num_columns = ends[world.rank + 1] - ends[world.rank]
    delivered = world.delivered(parcels, [[((count, num_columns), rows.dtype)] for count in counts])
    with world.together():
        partial = gram(torch.cat([piece.to(rows.device) for (piece,) in delivered]))
    return world.total(partial)
