"""OwnLoss: the model's own loss, row by row."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.model.loss.own_forms import (
    MATCH,
    LossForm,
    candidate_forms,
    count_targets,
    labels_of,
    logits_of,
    matching_forms,
    with_reversed_labels,
    without_labels,
)
from curvature_callbacks.model.loss.sample_losses import SampleLosses, cross_entropy, shifted_cross_entropy, without_targets
from curvature_callbacks.processes.fsdp import passes_are_collective
from curvature_callbacks.processes.group import current_world, is_agreed

_OF_ROUTERS: Final = ("aux_loss", "z_loss")  # how the outputs of mixtures of experts name them


@final
@dataclass(slots=True)
class _Settled:
    """What is known about batches of one layout; `form` None: none fits, the model's mean has to do."""

    form: LossForm | None
    needs_labels: bool | None = None  # whether the logits do; None: not tried yet
    by_rows: bool = False  # where no form fits: whether the model's mean is one over rows, not over targets


@final
class OwnLoss:
    """The model's own loss, rebuilt from its logits in whichever standard form gives the value of `.loss`.

    Names do not tell shift, head and problem type apart; values do. The form is settled at the first call whose value is
    finite and fits one form only, and kept, for every layout of batches (its keys, kind and rank of the labels) by itself;
    where none fits, the model's mean loss times its targets is used, or times its rows where two halves of the batch say that
    it is a mean over these (CTC). Where the logits are bit for bit the same without `labels`, the model is called without them
    from then on: it would compute a loss that is not used. Where parameters are gathered on use there is one call only, with
    labels. One object may serve a whole run.

    Questions answered by spans have two targets a row, start and end. Their models average over starts and over ends before
    they average the two; here every target weighs the same, which differs where a batch has more starts than ends beyond the
    sequence.

    Args:
        label_smoothing: None for the loss as it is; a number for the cross-entropy with these labels smoothed, at the
            positions and with the shift of the model's own, which has to be a cross-entropy of `labels` then. This is what
            `label_smoothing_factor` makes of the loss in Hugging Face's Trainer.

    Cost: two more evaluations of the loss at the first call; two more forward passes at the first without gradients (one where
    no form fits).
    """

    def __init__(self, *, label_smoothing: float | None = None) -> None:
        self._label_smoothing = label_smoothing
        self._settled: dict[Hashable, _Settled] = {}

    def __call__(self, model: nn.Module, batch: Any) -> SampleLosses:
        """Losses of `batch`, a mapping called as `model(**batch)`.

        Raises:
            ConfigurationError: the model returns no loss, or not the cross-entropy that is to be smoothed.
            ProbeError: it returns no logits where it gave them before; with smoothing also, its loss is not finite before its
                form is known.
        """
        known = self._settled.get(_layout(batch))
        if known is not None and known.form is not None and known.needs_labels is False:
            return self._rebuilt(known.form, _fitting_logits(model, model(**without_labels(batch)), batch, known.form), batch)
        output = model(**batch)
        loss = _loss_of(output, batch)
        if known is None:
            counts = count_targets(model, output, batch)
            if not counts.any():  # the model's mean is 0 / 0 and tells nothing about the form
                return _uncounted(model, output, batch, counts, loss)
            known = self._settle(model, batch, output, loss)
        if self._label_smoothing is not None:
            _require_cross_entropy(known.form, loss)
        if known.form is None:
            counts = count_targets(model, output, batch)
            return _mean_times_targets(loss, torch.ones_like(counts) if known.by_rows else counts, coupled=_router_loss(output))
        logits = _fitting_logits(model, output, batch, known.form)
        if known.needs_labels is None and _may_call_again(model):
            known.needs_labels = _logits_need_labels(model, batch, logits)
        return self._rebuilt(known.form, logits, batch)

    def _rebuilt(self, form: LossForm, logits: Tensor, batch: Mapping[str, Any]) -> SampleLosses:
        if self._label_smoothing is None:
            return form(logits, labels_of(batch))
        return form(logits, labels_of(batch), label_smoothing=self._label_smoothing)

    def _settle(self, model: nn.Module, batch: Mapping[str, Any], output: Any, loss: Tensor) -> _Settled:
        matching = matching_forms(model, output, batch, loss.detach())
        if not matching and not loss.isfinite() and _may_call_again(model):
            matching = _matching_finite_rows(model, output, batch)
        found = _Settled(matching[0] if matching else None)
        if not matching and _may_call_again(model):
            found.by_rows = _averages_rows(model, batch, loss, count_targets(model, output, batch))
        if len(matching) == 1 or (not matching and loss.isfinite()):  # else nothing is proven: look again at the next call
            self._settled[_layout(batch)] = found
        return found


def _layout(batch: Mapping[str, Any]) -> Hashable:
    labels = labels_of(batch)
    return frozenset(batch), None if labels is None else (labels.is_floating_point(), labels.ndim)


def _may_call_again(model: nn.Module) -> bool:
    """Whether there may be further passes where the rows call for them: those of other processes may not.

    A pass with gradients may be watched: one call only.
    """
    return not torch.is_grad_enabled() and not passes_are_collective(model)


def _loss_of(output: Any, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            "the model returns no `.loss` for the drawn microbatch (keys: " + ", ".join(map(str, batch)) + "): the loss "
            "cannot be determined. Add `labels` to the batch or pass a loss function."
        )
    return loss


def _require_cross_entropy(form: LossForm | None, loss: Tensor) -> None:
    if form in (cross_entropy, shifted_cross_entropy):
        return
    if form is None and not loss.isfinite():
        raise ProbeError(f"the model's own loss is {loss.item()}: it cannot tell yet whether labels are shifted.")
    raise ConfigurationError(
        "`loss`=CrossEntropyLoss on mapping batches takes positions and shift from the model's own loss, which has to be the "
        "mean cross-entropy of `.logits` at `labels`, and for this model it is not: pass a loss function "
        "`(model, batch) -> scalar mean or (N,) losses`."
    )


def _matching_finite_rows(model: nn.Module, output: Any, batch: Mapping[str, Any]) -> list[LossForm]:
    """The same of the rows whose logits are finite: one bad row hides the value of all others."""
    logits = logits_of(output, batch)
    if logits is None or len(logits) != batch_size(batch):
        return []
    finite = logits.flatten(1).isfinite().all(1)
    if not finite.any():
        return []
    rows = take_rows(batch, finite.nonzero()[:, 0])
    again = model(**rows)
    return matching_forms(model, again, rows, _loss_of(again, rows).detach())


def _averages_rows(model: nn.Module, batch: Mapping[str, Any], loss: Tensor, counts: Tensor) -> bool:
    """Whether `loss` is the mean of that of two halves of the batch weighed by their rows, and not weighed by their targets.

    False where it may be both, and for many processes, which could come to different answers.
    """
    N = batch_size(batch)
    if N < 2 or len(counts) != N or current_world().size > 1:
        return False
    halves = [torch.arange(start, N, 2) for start in (0, 1)]
    parts = [_loss_of(model(**part), part) for part in (take_rows(batch, rows) for rows in halves)]

    def fits(weights: Tensor) -> bool:
        mean = sum(part * weights[rows].sum() for part, rows in zip(parts, halves, strict=True)) / weights.sum()
        return bool((mean - loss).abs() <= MATCH * loss.abs())

    return fits(torch.ones(N)) and not fits(counts.cpu().float())


def _fitting_logits(model: nn.Module, output: Any, batch: Mapping[str, Any], form: LossForm) -> Tensor:
    logits, labels = logits_of(output, batch), labels_of(batch)
    if logits is None or form not in candidate_forms(model, logits, batch):
        found = "no tensor" if logits is None else f"of shape {tuple(logits.shape)}"
        raise ProbeError(
            f"the model's `.logits` are {found} for labels of shape {None if labels is None else tuple(labels.shape)}: its "
            "loss was rebuilt from them in a form that does not fit any more. Pass a loss function where the model's output "
            "changes."
        )
    return logits


def _logits_need_labels(model: nn.Module, batch: Mapping[str, Any], logits: Tensor) -> bool | None:
    """Whether labels in reverse or none at all give other logits in any bit; None where reversing changes nothing.

    Without the reversal, a sequence-to-sequence model that makes inputs of its labels, else of its inputs, would pass where a
    batch has the same for both.
    """
    others = with_reversed_labels(batch)
    if others is None:
        return None
    return not all(_gives(model, other, batch, logits) for other in (others, without_labels(batch)))


def _gives(model: nn.Module, other: Mapping[str, Any], batch: Mapping[str, Any], logits: Tensor) -> bool:
    try:
        found = logits_of(model(**other), batch)
    except Exception as error:  # whatever a model raises without its labels, it needs them
        if is_agreed(error):
            raise
        return False
    return found is not None and found.dtype == logits.dtype and torch.equal(found.nan_to_num(), logits.nan_to_num())


def _uncounted(model: nn.Module, output: Any, batch: Mapping[str, Any], counts: Tensor, loss: Tensor) -> SampleLosses:
    """Losses of a batch without a target: zero through the logits, where these have a form that counts none either.

    Backward passes through parameters that are gathered on use are everybody's, also of a process that has no target.
    """
    logits, labels = logits_of(output, batch), labels_of(batch)
    forms = candidate_forms(model, logits, batch) if logits is not None and labels is not None else []
    possible = (form(logits, labels) for form in forms)
    found = next((losses for losses in possible if not losses.num_targets.any()), None)
    return without_targets(counts, loss.device, loss.dtype) if found is None else found


def _router_loss(output: Any) -> str | None:
    """The name of a loss that balances the experts over the whole batch, where the model's own has one in it.

    Products of means over all rows: as a thousandth of the loss, which is usual, too small to show in the value of it.
    """
    parts = getattr(output, "__dict__", {}).items()
    return next((name for name, value in parts if name.endswith(_OF_ROUTERS) and isinstance(value, Tensor)), None)


def _mean_times_targets(loss: Tensor, counts: Tensor, *, coupled: str | None) -> SampleLosses:
    total = loss * counts.sum().to(loss.device) if counts.any() else loss.new_zeros(())
    return SampleLosses(total, counts, None, coupled=coupled)
