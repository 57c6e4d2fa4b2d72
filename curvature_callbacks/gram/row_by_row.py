"""Per-sample gradients row by row: slow, exact, for any operation."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.errors import RefusedError
from curvature_callbacks.linalg.accumulate import gram
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.loss.surrogates import Surrogate
from curvature_callbacks.model.objective import Objective, gradients
from curvature_callbacks.processes.world import SINGLE, World

Part = tuple[str, int, int]  # elements start:stop of a flattened parameter

_GROUP_BYTES: Final = 1 << 28  # gradients of all samples held at a time

_COUPLING: Final = 1e-3  # relative disagreement of the sum over rows with the batch, beyond which samples are not separate


def row_grams(
    objective: Objective,
    microbatches: Sequence[Any],
    names: Sequence[str],
    surrogates: Sequence[Sequence[Surrogate | None]],
    *,
    world: World = SINGLE,
) -> dict[str, Tensor]:
    """Name to the Gram (S, S) float64 of that parameter's per-sample gradients, by one forward pass a row.

    Args:
        objective: the loss.
        microbatches: of the probe.
        names: parameters.
        surrogates: for each microbatch what its backward passes differentiate; None for the sum of losses.
        world: the processes whose samples S counts too, by rank.

    Raises:
        RefusedError: the losses of single rows do not add up to the loss of the batch.

    Cost: N gradients of one row (and a further backward pass for each further surrogate), once per 256 MiB of `S x P`; extra
    memory 256 MiB.
    """
    grams: dict[str, Tensor] = {}
    if not names:
        return grams
    own = sum(batch_size(batch) * len(chosen) for batch, chosen in zip(microbatches, surrogates, strict=True))
    for group in _groups(objective, names, int(world.total(torch.tensor(own)))):
        with world.together():
            found = [
                row
                for batch, chosen in zip(microbatches, surrogates, strict=True)
                for row in _pass_major(_row_gradients(objective, batch, group, chosen), len(chosen))
            ]
        for place, (name, start, stop) in enumerate(group):
            nothing = objective.parameters[name].new_zeros(0, stop - start)
            K = gram_together(torch.stack([row[place] for row in found]) if found else nothing, world=world)
            grams[name] = grams[name] + K if name in grams else K
    return grams


def finite_rows(objective: Objective, batch: Any) -> Tensor:
    """(N,) whether the gradient of a row's loss is finite. Cost: N gradients of one row."""
    leaves = objective.leaves()
    flags = []
    for row in torch.arange(batch_size(batch)):
        found = gradients(objective(take_rows(batch, row[None]), leaves).total, leaves)
        flags.append(all(bool(gradient.isfinite().all()) for gradient in found.values()))
    return torch.tensor(flags)


def _groups(objective: Objective, names: Sequence[str], num_samples: int) -> list[list[Part]]:
    """Parts of the parameters whose gradients for all samples fit in memory together."""
    groups: list[list[Part]] = []
    held = _GROUP_BYTES
    for name in names:
        parameter = objective.parameters[name]
        width = max(1, _GROUP_BYTES // (num_samples * parameter.element_size()))
        for start in range(0, parameter.numel(), width):
            stop = min(start + width, parameter.numel())
            size = num_samples * (stop - start) * parameter.element_size()
            if not groups or held + size > _GROUP_BYTES:
                groups.append([])
                held = 0
            groups[-1].append((name, start, stop))
            held += size
    return groups


def _row_gradients(
    objective: Objective, batch: Any, group: Sequence[Part], chosen: Sequence[Surrogate | None]
) -> list[list[Tensor]]:
    """For each row and surrogate the gradients of the group's parts."""
    leaves = objective.leaves(dict.fromkeys(name for name, _, _ in group))
    result, total = [], 0.0
    for row in torch.arange(batch_size(batch)):
        losses = objective(take_rows(batch, row[None]), leaves)
        total += float(losses.total.detach())
        for number, surrogate in enumerate(chosen):
            loss = losses.total if surrogate is None else surrogate.restricted(row[None])(losses).sum()
            found = gradients(loss, leaves, again=number < len(chosen) - 1)
            result.append([found[name].flatten()[start:stop].clone() for name, start, stop in group])
    check_separable(objective, batch, total)
    return result


def _pass_major(rows: list[list[Tensor]], num_passes: int) -> list[list[Tensor]]:
    """Sorted by backward pass, then row, as the hooked passes give them."""
    return [rows[index] for number in range(num_passes) for index in range(number, len(rows), num_passes)]


def check_rows(objective: Objective, batch: Any, losses: SampleLosses) -> None:
    """`check_separable` for the single rows of a batch with these losses: halves of a ragged one can balance by chance.

    Cost: one forward pass over the batch and one over each row.
    """
    if losses.coupled is not None:
        raise RefusedError(
            f"the loss has a part, `{losses.coupled}`, of all rows of a batch together: samples are coupled and have no "
            "gradients of their own. Measure a loss without it (`output_router_logits`=False, or a loss function)."
        )
    with torch.no_grad():
        rows = torch.arange(batch_size(batch))
        total = sum(float(objective(take_rows(batch, row[None])).total) for row in rows)
    check_separable(objective, batch, total)


def check_apart(objective: Objective, batch: Any) -> None:
    """Raise a `RefusedError` unless every row has the same loss among half of its companions.

    Random signs cannot see what rows take from each other without a gradient (a batch mean that is subtracted).

    Cost: two forward passes over the batch.
    """
    size = batch_size(batch)
    with torch.no_grad():
        whole = objective(batch).per_sample
        if whole is None or size < 2:
            return
        for rows in (torch.arange(0, size, 2), torch.arange(1, size, 2)):
            half = objective(take_rows(batch, rows)).per_sample
            among_all = whole[rows.to(whole.device)]
            if half is None or bool(((half - among_all).abs() > _COUPLING * (among_all.abs() + whole.abs().mean())).any()):
                raise RefusedError(
                    "the loss of a row depends on the other rows of its batch: samples are coupled (batch statistics, a "
                    "contrastive loss) and have no gradients of their own."
                )


def check_separable(objective: Objective, batch: Any, total: float) -> None:
    """Raise a `RefusedError` unless `total`, summed over parts of `batch`, is the batch's own `sum_i l_i`."""
    with torch.no_grad():
        whole = float(objective(batch).total)
    if abs(total - whole) > _COUPLING * abs(whole):
        raise RefusedError(
            f"the losses of single rows add up to {total:.6g}, the batch's to {whole:.6g}: samples are coupled (a "
            "batch-wide loss, a mean over ragged targets) and have no gradients of their own. Pass a loss function that "
            "returns one loss per row."
        )


def gram_together(rows: Tensor, *, world: World) -> Tensor:
    """`R R'` (S, S) float64, R the `rows` (S_r, p) of all processes one below the other: each takes a part of the columns.

    Cost: all but a W-th of `rows` travels, and a sum of S x S numbers.
    """
    if world.size == 1:
        return gram(rows)
    counts = world.gathered(len(rows))
    width = -(-rows.shape[1] // world.size)
    ends = [min(width * rank, rows.shape[1]) for rank in range(world.size + 1)]
    parcels = [[rows[:, start:end]] for start, end in pairwise(ends)]
    own = ends[world.rank + 1] - ends[world.rank]
    found = world.delivered(parcels, [[((count, own), rows.dtype)] for count in counts])
    with world.together():
        partial = gram(torch.cat([piece.to(rows.device) for (piece,) in found]))
    return world.total(partial)
