"""The standard forms of a model's own loss, and the logits and labels of its mapping batches that they are built from."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from curvature_callbacks.batches import batch_size
from curvature_callbacks.model.loss.sample_losses import (
    IGNORED,
    SampleLosses,
    binary_cross_entropies,
    cross_entropies,
    shifted_cross_entropies,
    span_cross_entropies,
    squared_errors,
)

LossForm = Callable[..., SampleLosses]  # of logits and labels; cross-entropies also with `label_smoothing`

MATCH: Final = 1e-4  # relative agreement with the model's own loss; float32 sums differ by about 1e-6
_POSITIONS: Final = ("start_positions", "end_positions")


def labels_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The `labels`, else (N, 2) start and end positions of spans."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        return labels
    positions = [batch.get(key) for key in _POSITIONS]
    if not _has_spans(batch) or not all(_is_column(position) for position in positions):
        return None
    return torch.stack([position.flatten() for position in positions if position is not None], dim=1)


def logits_of(output: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """The `.logits`, for spans (N, 2, T) `.start_logits` and `.end_logits`."""
    if not _has_spans(batch):
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
    if _has_spans(batch):
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


def matching_forms(model: nn.Module, output: Any, batch: Mapping[str, Any], loss: Tensor) -> list[LossForm]:
    """Those among them that give the value of the model's `loss`."""
    logits, labels = logits_of(output, batch), labels_of(batch)
    if logits is None or labels is None:
        return []
    possible = [form for form in candidate_forms(model, logits, batch) if _has_classes(form, logits, labels)]
    means = [(form, _mean(form, form(logits.detach(), labels))) for form in possible]
    return [form for form, mean in means if bool((mean - loss).abs() <= MATCH * loss.abs())]


def count_targets(model: nn.Module, output: Any, batch: Mapping[str, Any]) -> Tensor:
    """(N,) valid targets by the look of labels and model, for a loss whose form is not known."""
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point() or labels.ndim == 0:
        return torch.ones(batch_size(batch), dtype=torch.int64)
    if _has_spans(batch):
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


def _has_spans(batch: Mapping[str, Any]) -> bool:
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
