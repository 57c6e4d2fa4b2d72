"""OwnLoss: the model's own loss, row by row."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.model.sample_losses import (
    IGNORED,
    SampleLosses,
    binary_cross_entropies,
    cross_entropy,
    shifted_cross_entropy,
    squared_errors,
    without_targets,
)

_MATCH: Final = 1e-4  # relative agreement with the model's own loss; float32 sums differ by about 1e-6

_Form = Callable[[Tensor, Tensor], SampleLosses]


@final
@dataclass(slots=True)
class _Settled:
    """What is known about batches of one layout; `form` None: none fits, the model's mean has to do."""

    form: _Form | None
    needs_labels: bool | None = None  # whether the logits do; None: not tried yet


@final
class OwnLoss:
    """The model's own loss, rebuilt from its logits in whichever standard form gives the value of `.loss`.

    Names do not tell shift, head and problem type apart; values do. The form is settled at the first call whose value is
    finite and fits one form only, and kept, for every layout of batches (its keys, kind and rank of the labels) by itself;
    where none fits, the model's mean loss times its targets is used. Where the logits are bit for bit the same without
    `labels`, the model is called without them from then on: it would compute a loss that is not used. One object may serve a
    whole run.

    Cost: two more evaluations of the loss at the first call; two more forward passes at the first without gradients.
    """

    def __init__(self) -> None:
        self._settled: dict[Hashable, _Settled] = {}

    def __call__(self, model: nn.Module, batch: Any) -> SampleLosses:
        """Losses of `batch`, a mapping called as `model(**batch)`.

        Raises:
            ConfigurationError: the model returns no loss.
            ProbeError: it returns no logits where it gave them before.
        """
        known = self._settled.get(_layout(batch))
        if known is not None and known.form is not None and known.needs_labels is False:
            logits = _fitting_logits(model, model(**_without_labels(batch)), batch, known.form)
            return known.form(logits, batch["labels"])
        output = model(**batch)
        loss = _loss_of(output, batch)
        if known is None:
            counts = _count_targets(batch, shifted=_is_causal(model))
            if not counts.any():  # the model's mean is 0 / 0 and tells nothing about the form
                return without_targets(counts, loss.device, loss.dtype)
            known = self._settle(model, batch, output, loss)
        if known.form is None:
            return _mean_times_targets(loss, _count_targets(batch, shifted=_is_causal(model)))
        logits = _fitting_logits(model, output, batch, known.form)
        if known.needs_labels is None and not torch.is_grad_enabled():  # a pass with gradients may be watched: one call only
            known.needs_labels = _logits_need_labels(model, batch, logits)
        return known.form(logits, batch["labels"])

    def _settle(self, model: nn.Module, batch: Mapping[str, Any], output: Any, loss: Tensor) -> _Settled:
        matching = _matching_forms(model, output, batch)
        if not matching and not loss.isfinite() and not torch.is_grad_enabled():
            matching = _matching_finite_rows(model, output, batch)
        found = _Settled(matching[0] if matching else None)
        if len(matching) == 1 or (not matching and loss.isfinite()):  # else nothing is proven: look again at the next call
            self._settled[_layout(batch)] = found
        return found


def _layout(batch: Mapping[str, Any]) -> Hashable:
    labels = batch.get("labels")
    kind = (labels.is_floating_point(), labels.ndim) if isinstance(labels, Tensor) else None
    return frozenset(batch), kind


def _loss_of(output: Any, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            "the model returns no `.loss` for the drawn microbatch (keys: " + ", ".join(map(str, batch)) + "): the loss "
            "cannot be determined. Add `labels` to the batch or pass a loss function."
        )
    return loss


def _matching_forms(model: nn.Module, output: Any, batch: Mapping[str, Any]) -> list[_Form]:
    """The forms that give the value of the model's loss."""
    loss = _loss_of(output, batch).detach()
    logits, labels = getattr(output, "logits", None), batch.get("labels")
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return []
    return [form for form in _forms(model, logits, labels) if _agrees(form(logits.detach(), labels), loss)]


def _matching_finite_rows(model: nn.Module, output: Any, batch: Mapping[str, Any]) -> list[_Form]:
    """The same of the rows whose logits are finite: one bad row hides the value of all others."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or len(logits) != batch_size(batch):
        return []
    finite = logits.flatten(1).isfinite().all(1)
    rows = take_rows(batch, finite.nonzero()[:, 0])
    return _matching_forms(model, model(**rows), rows) if finite.any() else []


def _agrees(rebuilt: SampleLosses, loss: Tensor) -> bool:
    mean = rebuilt.total / rebuilt.num_targets.sum()
    return bool((mean - loss).abs() <= _MATCH * loss.abs())


def _forms(model: nn.Module, logits: Tensor, labels: Tensor) -> list[_Form]:
    """The standard forms these shapes allow, the likely one first."""
    if labels.is_floating_point() and labels.numel() == logits.numel():
        return [squared_errors, binary_cross_entropies]
    if labels.is_floating_point():
        return []
    if logits.ndim == labels.ndim + 1 == 3 and logits.shape[:2] == labels.shape:
        return [shifted_cross_entropy, cross_entropy] if _is_causal(model) else [cross_entropy, shifted_cross_entropy]
    if logits.ndim == labels.ndim + 1 == 2 and len(logits) == len(labels):
        return [cross_entropy]
    return []


def _fitting_logits(model: nn.Module, output: Any, batch: Mapping[str, Any], form: _Form) -> Tensor:
    logits: Any = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or form not in _forms(model, logits, batch["labels"]):
        found = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no tensor"
        raise ProbeError(
            f"the model's `.logits` are {found} for labels of shape {tuple(batch['labels'].shape)}: its loss was rebuilt from "
            "them in a form that does not fit any more. Pass a loss function where the model's output changes."
        )
    return logits


def _logits_need_labels(model: nn.Module, batch: Mapping[str, Any], logits: Tensor) -> bool | None:
    """Whether labels in reverse or none at all give other logits in any bit; None where reversing changes nothing.

    Without the reversal, a sequence-to-sequence model that makes inputs of its labels, else of its inputs, would pass where a
    batch has the same for both.
    """
    labels = batch["labels"]
    reversed_labels = labels.flatten().flip(0).reshape(labels.shape)
    if torch.equal(reversed_labels, labels):
        return None
    others = ({**batch, "labels": reversed_labels}, _without_labels(batch))
    return not all(_gives(model, other, logits) for other in others)


def _gives(model: nn.Module, batch: Mapping[str, Any], logits: Tensor) -> bool:
    try:
        found: Any = getattr(model(**batch), "logits", None)
    except Exception:  # whatever a model raises without its labels, it needs them
        return False
    same_kind = isinstance(found, Tensor) and found.dtype == logits.dtype
    return same_kind and torch.equal(found.nan_to_num(), logits.nan_to_num())


def _without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


def _mean_times_targets(loss: Tensor, counts: Tensor) -> SampleLosses:
    total = loss * counts.sum().to(loss.device) if counts.any() else loss.new_zeros(())
    return SampleLosses(total, counts, None)


def _is_causal(model: nn.Module) -> bool:
    name = type(model).__name__
    return "CausalLM" in name or "LMHead" in name


def _count_targets(batch: Mapping[str, Any], *, shifted: bool) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim == 0:
        return torch.ones(batch_size(batch), dtype=torch.int64)
    valid = labels[:, 1:] if shifted and labels.ndim > 1 else labels
    return (valid != IGNORED).reshape(len(labels), -1).sum(1)
