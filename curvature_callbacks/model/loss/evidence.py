"""Evidence of what a loss averages over: its value and gradient on a few rows, on halves of them and with other labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from curvature_callbacks.errors import is_out_of_memory
from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.model.loss.averages import FOLLOWING, GIVEN, ROWS, SUM, row_weights
from curvature_callbacks.model.loss.sample_losses import IGNORED
from curvature_callbacks.processes.fsdp import passes_are_collective
from curvature_callbacks.processes.group import is_agreed

MeanLoss = Callable[[nn.Module, Any], Tensor]  # of a batch, 0-d

_NUM_ROWS: Final = 4
_PROJECTIONS: Final = 8
# An average holds where its parts predict the whole to this, relative, and not ten times worse than the best one does: float32
# means of a few rows differ by 1e-7 and gradients by 1e-6, on an accelerator of reduced precision by 1e-3. Between wrong
# averages there is seldom less than 1e-4 of the value (near initialisation less) and a tenth of the gradient.
_WORST: Final = torch.tensor([1e-4, 1e-2], dtype=torch.float64)
_BEST: Final = torch.tensor([2e-7, 1e-5], dtype=torch.float64)
_MARGIN: Final = 10


def telling_rows(batch: Any) -> Microbatch:
    """A few rows of `batch` that differ in their number of labels as much as rows of it do, those with the fewest first.

    At most one of them has none, and a single one that has any comes twice: halves of them always have a label each. Where
    labels are ignored in the batch, so that the loss knows how to, half of those of the first rows are ignored as well unless
    the others have twice as many: rows with equally many labels do not tell a mean over labels from one over rows. A batch that
    stays whole tells what it can by itself.
    """
    microbatch = as_microbatch(batch)
    if microbatch.is_whole:
        return microbatch
    weights = row_weights(microbatch)
    labels = weights.get(GIVEN, weights[ROWS])
    order = labels.argsort(stable=True)
    without, labelled = order[labels[order] == 0][:1], order[labels[order] > 0]
    picked = torch.linspace(0, len(labelled) - 1, max(2, min(len(labelled), _NUM_ROWS - len(without)))).round().long()
    chosen = torch.cat([without, labelled[picked.clamp_min(0)]]) if len(labelled) else order[:2]
    return _partly_ignored(microbatch.take(chosen), microbatch.content)


def contradicted_averages(loss: MeanLoss, model: nn.Module, batch: Any) -> frozenset[str] | None:
    """The names of averages by which parts of `batch` do not make the whole; None where nothing can be told.

    `loss` and its gradient, both linear in the objective, are computed of a few rows and of two halves of these: the halves
    weighed by their rows or labels have to give the whole. Whether the first label is read shows by another one in its place.
    Gradients, as a few random projections, tell averages apart whose values agree near initialisation.

    Cost: five gradients of at most four rows. Forward passes alone where processes have to make the same ones.

    Args:
        loss: called three or six times.
        model: at parameters that require gradients.
        batch: with at least one row.
    """
    try:
        microbatch = as_microbatch(batch)
        telling = telling_rows(microbatch)
        halves = torch.arange(telling.num_rows).tensor_split(2)
        whole = _evidence(loss, model, telling)
        parts = [_evidence(loss, model, telling.take(half)) for half in halves]
        shift = _contradicted_shift(loss, model, microbatch.take(torch.arange(min(microbatch.num_rows, _NUM_ROWS))))
    except Exception as error:
        if is_agreed(error) or is_out_of_memory(error) or passes_are_collective(model):
            raise
        return None  # a loss that takes no other rows or labels
    if not whole.isfinite().all() or not whole.any():
        return None
    contradicted = _contradicted(whole, parts, halves, row_weights(telling))
    return contradicted if {FOLLOWING, GIVEN} & contradicted else contradicted | shift


def _contradicted(
    whole: Tensor, parts: Sequence[Tensor], halves: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> frozenset[str]:
    scale = torch.stack([_sizes(each) for each in (whole, *parts)]).amax(0)
    errors = {}
    for name, counts in weights.items():
        total = 1.0 if name == SUM else float(counts.sum())
        if total:
            shares = [1.0 if name == SUM else float(counts[half].sum()) / total for half in halves]
            predicted = sum(share * part.nan_to_num() for share, part in zip(shares, parts, strict=True))
            errors[name] = _sizes(predicted - whole) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    best = torch.stack(list(errors.values())).amin(0)
    limit = torch.minimum(_WORST, torch.maximum(_MARGIN * best, _BEST * _MARGIN))
    return frozenset(name for name in weights if name not in errors or bool((errors[name] > limit).any()))


def _contradicted_shift(loss: MeanLoss, model: nn.Module, batch: Microbatch) -> frozenset[str]:
    """Which average over labels is contradicted by what other first labels change, or leave as it is.

    None of them where there are no other ones, or where other labels everywhere change nothing either.
    """
    others = _other_classes(_sequences_of(batch.content))
    variants = [batch, batch, batch]  # as many passes wherever processes have to make the same ones
    if others is not None:
        only_first = torch.cat([others[:, :1], batch["labels"][:, 1:]], 1)
        variants = [batch, _with_labels(batch, only_first), _with_labels(batch, others)]
    elif not passes_are_collective(model):
        return frozenset()
    given, of_first, of_all = [_evidence(loss, model, variant) for variant in variants]
    if not _differ(given, of_all):
        return frozenset()
    return frozenset({FOLLOWING if _differ(given, of_first) else GIVEN})


def _differ(one: Tensor, other: Tensor) -> bool:
    return bool((_sizes(one - other) > _BEST * _sizes(one)).any())


def _evidence(loss: MeanLoss, model: nn.Module, batch: Microbatch) -> Tensor:
    """(1 + projections,) the loss of `batch`, and its gradient projected at random, the parameters by turns."""
    value = loss(model, batch)
    if value.ndim:
        raise ValueError("the loss is a mean of some batches and not of others")
    evidence = torch.zeros(1 + _PROJECTIONS, dtype=torch.float64)
    evidence[0] = value.detach()
    leaves = [] if passes_are_collective(model) else [each for each in model.parameters() if each.requires_grad]
    if not value.requires_grad or not leaves:
        return evidence
    for number, gradient in enumerate(torch.autograd.grad(value, leaves, allow_unused=True)):
        if gradient is not None:
            evidence[1 + number % _PROJECTIONS] += _projected(gradient, number)
    return evidence


def _projected(gradient: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(gradient.device).manual_seed(seed)
    weights = torch.randn(gradient.shape, generator=generator, device=gradient.device, dtype=torch.float32)
    return (gradient.to_dense() if gradient.is_sparse else gradient).double().flatten().dot(weights.double().flatten()).cpu()


def _sizes(evidence: Tensor) -> Tensor:
    """(2,) of the value and of the gradient."""
    return torch.stack([evidence[0].abs(), evidence[1:].nan_to_num().norm()]).nan_to_num()


def _partly_ignored(rows: Microbatch, batch: Any) -> Microbatch:
    labels = _sequences_of(batch)
    given = row_weights(rows).get(GIVEN)
    if labels is None or given is None or IGNORED not in labels:
        return rows
    first, others = given.tensor_split(2)
    if not len(others) or 2 * int(first.max()) <= int(others.min()):
        return rows
    chosen = rows["labels"].clone()
    for row in chosen[: len(first)]:
        valid = (row != IGNORED).nonzero()
        row[valid[: len(valid) // 2].unbind(1)] = IGNORED
    return _with_labels(rows, chosen)


def _with_labels(rows: Microbatch, labels: Tensor) -> Microbatch:
    """The same inputs with other labels; they cannot be collated anew."""
    return replace(rows, content={**rows.content, "labels": labels}, collate=None)


def _other_classes(labels: Tensor | None) -> Tensor | None:
    """(N, T) another class of these labels in place of each; None where there is no other, or no first label."""
    if labels is None or labels.ndim != 2 or bool((labels[:, 0] == IGNORED).all()):
        return None
    classes = torch.unique(labels[labels != IGNORED])
    if len(classes) < 2:
        return None
    others = torch.where(labels == classes[0], classes[1], classes[0])
    return torch.where(labels == IGNORED, labels, others)


def _sequences_of(batch: Any) -> Tensor | None:
    """The labels of sequences, (N, T, ...) classes."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    is_classes = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim > 1
    return labels if is_classes else None
