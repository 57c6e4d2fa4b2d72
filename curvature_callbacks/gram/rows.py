"""Per-sample gradients row by row: slow, exact, for any operation."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.errors import RefusedError
from curvature_callbacks.linalg.accumulate import gram
from curvature_callbacks.model.objective import Objective, gradients

_GROUP_BYTES: Final = 1 << 30  # gradients of all samples held at a time
_COUPLING: Final = 1e-3  # relative disagreement of the sum over rows with the batch, beyond which samples are not separate


def row_grams(objective: Objective, microbatches: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Name to the Gram (N, N) float64 of that parameter's per-sample gradients, by one gradient a row.

    Raises:
        RefusedError: the losses of single rows do not add up to the loss of the batch.

    Cost: N gradients of one row each, once per 1 GiB of `N x P`; extra memory up to 1 GiB (or one parameter).
    """
    grams: dict[str, Tensor] = {}
    for group in _groups(objective, names, sum(map(batch_size, microbatches))):
        rows = [row for batch in microbatches for row in _row_gradients(objective, batch, group)]
        for position, name in enumerate(group):
            grams[name] = gram(torch.stack([row[position] for row in rows]))
    return grams


def finite_rows(objective: Objective, batch: Any) -> Tensor:
    """(N,) whether the gradient of a row's loss is finite. Cost: N gradients of one row."""
    leaves = objective.leaves()
    flags = []
    for row in torch.arange(batch_size(batch)):
        found = gradients(objective(take_rows(batch, row[None]), leaves).total, leaves)
        flags.append(all(bool(gradient.isfinite().all()) for gradient in found.values()))
    return torch.tensor(flags)


def _groups(objective: Objective, names: Sequence[str], num_samples: int) -> list[list[str]]:
    groups: list[list[str]] = []
    held = _GROUP_BYTES
    for name in names:
        parameter = objective.parameters[name]
        size = num_samples * parameter.numel() * parameter.element_size()
        if not groups or held + size > _GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _row_gradients(objective: Objective, batch: Any, names: Sequence[str]) -> list[list[Tensor]]:
    leaves = objective.leaves(names)
    result, total = [], 0.0
    for row in torch.arange(batch_size(batch)):
        loss = objective(take_rows(batch, row[None]), leaves).total
        result.append([gradient.flatten() for gradient in gradients(loss, leaves).values()])
        total += float(loss.detach())
    check_separable(objective, batch, total)
    return result


def check_rows(objective: Objective, batch: Any) -> None:
    """`check_separable` for the single rows of a batch: halves of a ragged one can balance by chance.

    Cost: one forward pass over the batch and one over each row.
    """
    with torch.no_grad():
        rows = torch.arange(batch_size(batch))
        total = sum(float(objective(take_rows(batch, row[None])).total) for row in rows)
    check_separable(objective, batch, total)


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
