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
from curvature_callbacks.model.loss.recording import is_recorded
from curvature_callbacks.model.loss.sample_losses import (
    SampleLosses,
    cross_entropies,
    shifted_cross_entropies,
    without_targets,
)
from curvature_callbacks.processes.fsdp import passes_are_collective
from curvature_callbacks.processes.group import current_world, is_agreed

_ROUTER_LOSSES: Final = ("aux_loss", "z_loss")  # how the outputs of mixtures of experts name them


@final
@dataclass(slots=True)
class _Settled:
    """What is known about batches of one layout.

    Attributes:
        form: of the loss; None where no standard one fits and the model's mean has to do.
        needs_labels: whether the logits of the form do; None until it was tried.
        is_mean_over_rows: where no form fits, whether the model's mean is one over rows and not over targets.
    """

    form: LossForm | None
    needs_labels: bool | None = None
    is_mean_over_rows: bool = False


@final
class OwnLoss:
    """The model's own loss, rebuilt from its logits in whichever standard form gives the value of `.loss`.

    Names do not tell shift, head and problem type apart; values do. The form is settled at the first call whose value is
    finite and fits one form only, and kept, for every layout of batches (its keys, dtype and rank of the labels) by itself;
    where none fits, the model's mean loss times its targets is used, or times its rows where two halves of the batch say that
    it is a mean over these (CTC). One object may serve a whole run. What a call does:

    | known of the layout | the model is called | the losses are |
    | --- | --- | --- |
    | a form; its logits are bit for bit those without labels | without labels | the form, of the logits |
    | a form; its logits need labels | with labels | the form, of the logits |
    | a form; whether they need labels was not tried | with labels, twice more to try it | the form, of the logits |
    | that no form fits | with labels | the model's mean, times targets or rows |
    | nothing; the batch has a valid target | with labels, more often to settle the form | as above, by what is settled |
    | nothing; the batch has none | with labels | zero, through the logits where these have a form |

    There is one call only, with labels, while gradients are recorded (the pass may be watched) and where parameters are
    gathered on use (other processes may not call again); what takes more calls waits for a later one.

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
        settled = self._settled.get(_batch_layout(batch))
        if settled is not None and settled.form is not None and settled.needs_labels is False:
            logits = _fitting_logits(settled.form, model, batch, model(**without_labels(batch)))
            return self._rebuilt(settled.form, logits, batch)
        evaluation = _evaluate(model, batch)
        if settled is None:
            if not evaluation.num_targets().any():  # the model's mean is 0 / 0 and tells nothing about the form
                return _without_targets(evaluation)
            settled = self._settle(evaluation)
        if self._label_smoothing is not None:
            _require_cross_entropy(settled.form, evaluation.loss)
        if settled.form is None:
            return _scaled_mean(evaluation, over_rows=settled.is_mean_over_rows)
        logits = _fitting_logits(settled.form, model, batch, evaluation.output)
        if settled.needs_labels is None and _may_call_again(model):
            settled.needs_labels = _logits_need_labels(model, batch, logits)
        return self._rebuilt(settled.form, logits, batch)

    def _rebuilt(self, form: LossForm, logits: Tensor, batch: Mapping[str, Any]) -> SampleLosses:
        if self._label_smoothing is None:
            return form(logits, labels_of(batch))
        return form(logits, labels_of(batch), label_smoothing=self._label_smoothing)

    def _settle(self, evaluation: "_Evaluation") -> _Settled:
        """What the evaluation tells about its layout; kept where it is proven, to be looked at again at the next call else."""
        may_call_again = _may_call_again(evaluation.model)
        is_finite = bool(evaluation.loss.isfinite())
        matching = evaluation.forms_of_loss()
        if not matching and not is_finite and may_call_again:
            matching = _forms_of_finite_rows(evaluation)
        settled = _Settled(matching[0] if matching else None)
        if not matching and may_call_again:
            settled.is_mean_over_rows = _is_mean_over_rows(evaluation)
        if len(matching) == 1 or (not matching and is_finite):
            self._settled[_batch_layout(evaluation.batch)] = settled
        return settled


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Evaluation:
    """One call of the model with labels: its output and its own mean loss, 0-d."""

    model: nn.Module
    batch: Mapping[str, Any]
    output: Any
    loss: Tensor

    def num_targets(self) -> Tensor:
        """(N,) valid targets, by the look of labels and model."""
        return count_targets(self.model, self.output, self.batch)

    def forms_of_loss(self) -> list[LossForm]:
        """The standard forms that give the value of the loss."""
        return matching_forms(self.model, self.output, self.batch, self.loss.detach())


def _evaluate(model: nn.Module, batch: Mapping[str, Any]) -> _Evaluation:
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            "the model returns no `.loss` for the drawn microbatch (keys: " + ", ".join(map(str, batch)) + "): the loss "
            "cannot be determined. Add `labels` to the batch or pass a loss function."
        )
    return _Evaluation(model, batch, output, loss)


def _batch_layout(batch: Mapping[str, Any]) -> Hashable:
    labels = labels_of(batch)
    return frozenset(batch), None if labels is None else (labels.is_floating_point(), labels.ndim)


def _may_call_again(model: nn.Module) -> bool:
    """Whether there may be further passes where the rows call for them: those of other processes may not.

    A pass with gradients may be watched: one call only.
    """
    return not is_recorded() and not passes_are_collective(model)


def _require_cross_entropy(form: LossForm | None, loss: Tensor) -> None:
    if form in (cross_entropies, shifted_cross_entropies):
        return
    if form is None and not loss.isfinite():
        raise ProbeError(f"the model's own loss is {loss.item()}: it cannot tell yet whether labels are shifted.")
    raise ConfigurationError(
        "`loss`=CrossEntropyLoss on mapping batches takes positions and shift from the model's own loss, which has to be the "
        "mean cross-entropy of `.logits` at `labels`, and for this model it is not: pass a loss function "
        "`(model, batch) -> scalar mean or (N,) losses`."
    )


def _forms_of_finite_rows(evaluation: _Evaluation) -> list[LossForm]:
    """The forms that match on the rows whose logits are finite: one bad row hides the value of all others.

    Cost: one forward pass over these.
    """
    model, batch = evaluation.model, evaluation.batch
    logits = logits_of(evaluation.output, batch)
    if logits is None or len(logits) != batch_size(batch):
        return []
    finite = logits.flatten(1).isfinite().all(1)
    if not finite.any():
        return []
    return _evaluate(model, take_rows(batch, finite.nonzero()[:, 0])).forms_of_loss()


def _is_mean_over_rows(evaluation: _Evaluation) -> bool:
    """Whether the loss is the mean of that of two halves of the batch weighed by their rows, and not weighed by their targets.

    False where it may be both, and for many processes, which could come to different answers. Cost: two forward passes over
    half the rows.
    """
    batch, loss, counts = evaluation.batch, evaluation.loss, evaluation.num_targets()
    N = batch_size(batch)
    if N < 2 or len(counts) != N or current_world().size > 1:
        return False
    halves = [torch.arange(start, N, 2) for start in (0, 1)]
    losses = [_evaluate(evaluation.model, take_rows(batch, rows)).loss for rows in halves]

    def fits(weights: Tensor) -> bool:
        mean = sum(half * weights[rows].sum() for half, rows in zip(losses, halves, strict=True)) / weights.sum()
        return bool((mean - loss).abs() <= MATCH * loss.abs())

    return fits(torch.ones(N)) and not fits(counts.cpu().float())


def _fitting_logits(form: LossForm, model: nn.Module, batch: Mapping[str, Any], output: Any) -> Tensor:
    """The logits in `output`, which `form` can take."""
    logits, labels = logits_of(output, batch), labels_of(batch)
    if logits is None or form not in candidate_forms(model, logits, batch):
        returned = "no tensor" if logits is None else f"of shape {tuple(logits.shape)}"
        raise ProbeError(
            f"the model's `.logits` are {returned} for labels of shape {None if labels is None else tuple(labels.shape)}: its "
            "loss was rebuilt from them in a form that does not fit any more. Pass a loss function where the model's output "
            "changes."
        )
    return logits


def _logits_need_labels(model: nn.Module, batch: Mapping[str, Any], logits: Tensor) -> bool | None:
    """Whether labels in reverse or none at all give other logits in any bit; None where reversing changes nothing.

    Without the reversal, a sequence-to-sequence model that makes inputs of its labels, else of its inputs, would pass where a
    batch has the same for both. Cost: two forward passes.
    """
    reversed_labels = with_reversed_labels(batch)
    if reversed_labels is None:
        return None
    return not all(_gives(model, changed, batch, logits) for changed in (reversed_labels, without_labels(batch)))


def _gives(model: nn.Module, changed: Mapping[str, Any], batch: Mapping[str, Any], logits: Tensor) -> bool:
    """Whether the model returns the `logits` of `batch` for the `changed` one too."""
    try:
        others = logits_of(model(**changed), batch)
    except Exception as error:  # whatever a model raises without its labels, it needs them
        if is_agreed(error):
            raise
        return False
    return others is not None and others.dtype == logits.dtype and torch.equal(others.nan_to_num(), logits.nan_to_num())


def _without_targets(evaluation: _Evaluation) -> SampleLosses:
    """Losses of a batch without a target: zero through the logits, where these have a form that counts none either.

    Backward passes through parameters that are gathered on use are everybody's, also of a process that has no target.
    """
    batch, loss = evaluation.batch, evaluation.loss
    logits, labels = logits_of(evaluation.output, batch), labels_of(batch)
    forms = candidate_forms(evaluation.model, logits, batch) if logits is not None and labels is not None else []
    possible = (form(logits, labels) for form in forms)
    empty = next((losses for losses in possible if not losses.num_targets.any()), None)
    return without_targets(evaluation.num_targets(), loss.device, loss.dtype) if empty is None else empty


def _scaled_mean(evaluation: _Evaluation, *, over_rows: bool) -> SampleLosses:
    """The model's mean times what it is a mean over: its rows or its targets."""
    loss, counts = evaluation.loss, evaluation.num_targets()
    counts = torch.ones_like(counts) if over_rows else counts
    total = loss * counts.sum().to(loss.device) if counts.any() else loss.new_zeros(())
    return SampleLosses(total, counts, None, coupled=_router_loss(evaluation.output))


def _router_loss(output: Any) -> str | None:
    """The name of a loss that balances the experts over the whole batch, where the model's own has one in it.

    Products of means over all rows: as a thousandth of the loss, which is usual, too small to show in the value of it.
    """
    parts = getattr(output, "__dict__", {}).items()
    return next((name for name, value in parts if name.endswith(_ROUTER_LOSSES) and isinstance(value, Tensor)), None)
