"""The standard forms of a model's own loss, and the logits and labels of its mapping batches that they are built from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from curvature_callbacks.model.loss.sample_losses import (
    IGNORED,
    SampleLosses,
    binary_cross_entropies,
    counts_of_rows,
    cross_entropies,
    shifted_cross_entropies,
    span_cross_entropies,
    squared_errors,
)

LossForm = Callable[..., SampleLosses]  # of logits and labels; cross-entropies also with `label_smoothing`

_GRADIENT: Final = 1e-3  # of its gradient, to which other positions or weights make a difference as large as itself
_POSITIONS: Final = ("start_positions", "end_positions")


def labels_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The `labels`, else (N, 2) start and end positions of spans."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        return labels
    positions = [batch.get(key) for key in _POSITIONS]
    if not has_spans(batch) or not all(_is_column(position) for position in positions):
        return None
    return torch.stack([position.flatten() for position in positions if position is not None], dim=1)


def logits_of(output: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """The `.logits`, for spans (N, 2, T) `.start_logits` and `.end_logits`."""
    if not has_spans(batch):
        logits = getattr(output, "logits", None)
        return logits if isinstance(logits, Tensor) else None
    start, end = getattr(output, "start_logits", None), getattr(output, "end_logits", None)
    if not isinstance(start, Tensor) or not isinstance(end, Tensor) or start.shape != end.shape or start.ndim != 2:
        return None
    return torch.stack([start, end], dim=1)


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` without `labels` and without the positions of spans."""
    return {key: value for key, value in batch.items() if key != "labels" and key not in _POSITIONS}


def with_reversed_labels(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same inputs with their labels in reverse; None where that changes nothing."""
    keys = [key for key in ("labels", *_POSITIONS) if isinstance(batch.get(key), Tensor)]
    turned = {key: batch[key].flatten().flip(0).reshape(batch[key].shape) for key in keys}
    return None if all(torch.equal(turned[key], batch[key]) for key in keys) else {**batch, **turned}


def candidate_forms(model: nn.Module, logits: Tensor, batch: Mapping[str, Any]) -> list[LossForm]:
    """The standard forms these shapes allow, the likely one first."""
    labels = labels_of(batch)
    if labels is None:
        return []
    if has_spans(batch):
        return [span_cross_entropies] if logits.shape[:2] == labels.shape else []
    if labels.numel() == logits.numel():  # integer ones too: counts are regressed
        return [squared_errors, binary_cross_entropies]
    if labels.is_floating_point():
        return []
    if logits.ndim == labels.ndim + 1 == 3 and logits.shape[:2] == labels.shape:
        return [shifted_cross_entropies, cross_entropies] if is_causal(model) else [cross_entropies, shifted_cross_entropies]
    if logits.ndim == 2 and len(logits) == len(labels) == labels.numel():
        return [cross_entropies]
    return []


def matching_forms(model: nn.Module, output: Any, batch: Mapping[str, Any], loss: Tensor, *, match: float) -> list[LossForm]:
    """Those among them that give the value of the model's `loss`, to `match` relative."""
    logits, labels = logits_of(output, batch), labels_of(batch)
    if logits is None or labels is None:
        return []
    possible = [form for form in candidate_forms(model, logits, batch) if _has_classes(form, logits, labels)]
    means = [(form, _mean(form, form(logits.detach(), labels))) for form in possible]
    return [form for form, mean in means if bool((mean - loss).abs() <= match * loss.abs())]


def forms_with_gradient(
    forms: Sequence[LossForm], output: Any, batch: Mapping[str, Any], loss: Tensor, leaves: Sequence[Tensor]
) -> list[LossForm] | None:
    """Those of `forms` that have the gradient of `loss` by the logits, else by the `leaves`; None where neither has one.

    A head of zeros gives all forms one value, but none the gradient of another. Cost: a backward pass through the loss alone,
    for a loss that does not come from `.logits` one through the model for each form.
    """
    logits, labels = logits_of(output, batch), labels_of(batch)
    if logits is None or labels is None or not loss.requires_grad or not logits.requires_grad:
        return None
    names = ("start_logits", "end_logits") if has_spans(batch) else ("logits",)
    inputs = [getattr(output, name) for name in names]
    if any(each is None for each in torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)):
        inputs = list(leaves)
    if not inputs:
        return None
    trained = _flat_gradient(loss, inputs)
    of_forms = [(form, _flat_gradient(_mean(form, form(logits, labels)), inputs)) for form in forms]
    return [form for form, gradient in of_forms if bool((gradient - trained).norm() <= _GRADIENT * trained.norm())]


def _flat_gradient(mean: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(mean, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def count_targets(model: nn.Module, output: Any, batch: Mapping[str, Any], *, num_rows: int) -> Tensor:
    """(num_rows,) valid targets by the look of labels and model, for a loss whose form is not known.

    Where labels have other rows than were drawn, their targets are shared out among these as evenly as can be.
    """
    counts = _counts_by_label(model, output, batch)
    if counts is None:
        return torch.ones(num_rows, dtype=torch.int64)
    return counts_of_rows(counts, num_rows)


def _counts_by_label(model: nn.Module, output: Any, batch: Mapping[str, Any]) -> Tensor | None:
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point() or labels.ndim == 0:
        return None
    if has_spans(batch):
        logits = logits_of(output, batch)
        return torch.full((len(labels),), 2) if logits is None else (labels < logits.shape[-1]).sum(1)
    valid = labels[:, 1:] if is_causal(model) and labels.ndim > 1 else labels
    return (valid != IGNORED).reshape(len(labels), -1).sum(1)


def is_causal(model: nn.Module) -> bool:
    """Whether the model's name says that it predicts the next token."""
    name = type(model).__name__
    return "CausalLM" in name or "LMHead" in name


def _is_column(position: Any) -> bool:
    """Whether it is a tensor of one number per row, (N,) or (N, 1, ...)."""
    return isinstance(position, Tensor) and position.ndim > 0 and len(position) == position.numel()


def has_spans(batch: Mapping[str, Any]) -> bool:
    """Whether its targets are start and end positions of spans."""
    return "labels" not in batch and all(key in batch for key in _POSITIONS)


def _has_classes(form: LossForm, logits: Tensor, labels: Tensor) -> bool:
    """Whether every label is a class or ignored: an accelerator does not survive one that is neither."""
    if form not in (cross_entropies, shifted_cross_entropies):
        return True
    return bool(((labels == IGNORED) | (labels >= 0) & (labels < logits.shape[-1])).all())


def _mean(form: LossForm, losses: SampleLosses) -> Tensor:
    """As models take it: over the targets, for spans the mean of that over starts and that over ends."""
    if form is not span_cross_entropies:
        return losses.total / losses.num_targets.sum()
    assert losses.per_target is not None
    assert losses.predictive is not None
    return (losses.per_target.sum(0) / losses.predictive.valid.sum(0)).mean()
