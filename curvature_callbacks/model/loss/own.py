"""OwnLoss: the model's own loss, row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.microbatch import as_microbatch
from curvature_callbacks.model.loss.averages import Averages, Evaluate
from curvature_callbacks.model.loss.evidence import contradicted_averages
from curvature_callbacks.model.loss.known_forms import KnownForm, KnownForms
from curvature_callbacks.model.loss.own_evaluation import LabelledCall, evaluated, forms_of_finite_rows, router_loss
from curvature_callbacks.model.loss.own_forms import (
    LossForm,
    candidate_forms,
    labels_of,
    logits_of,
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
from curvature_callbacks.processes.world import World


@final
class OwnLoss:
    """The model's own loss, rebuilt from its logits in whichever standard form gives `.loss` and its gradient.

    Names do not tell shift, head and problem type apart. Values do not always: near initialisation every position has the same
    loss, and where all rows have equally many labels a mean over rows is one over labels. `settle` therefore compares gradients
    by the logits too, on a few rows of which some labels are ignored where the data has such, and once more at the next probe.
    What it finds is kept for every layout of batches (its keys, dtype and rank of the labels) by itself; where no form fits,
    the model's mean loss is used times what it is a mean over (`Averages`). One object may serve a whole run. A loss that was
    not settled is, at its first call without gradients, by the value alone. What a call does:

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

    Cost: at each of two probes a forward pass over four rows, where no form fits five gradients of them more; two forward
    passes over a microbatch at the first call without gradients.
    """

    def __init__(self, *, label_smoothing: float | None = None) -> None:
        self._label_smoothing = label_smoothing
        self._forms = KnownForms()
        self._averages = Averages()

    def __call__(self, model: nn.Module, batch: Any) -> SampleLosses:
        """Losses of `batch`, whose content is a mapping that the model is called with.

        Raises:
            ConfigurationError: the model returns no loss, or not the cross-entropy that is to be smoothed.
            ProbeError: it returns no logits where it gave them before; with smoothing also, its loss is not finite before its
                form is known.
        """
        microbatch = as_microbatch(batch)
        batch = microbatch.content
        settled = self._forms.of(microbatch)
        if settled is not None and settled.form is not None and settled.needs_labels is False:
            logits = _fitting_logits(settled.form, model, batch, model(**without_labels(batch)))
            return self._rebuilt(settled.form, logits, batch)
        evaluation = evaluated(model, microbatch)
        if settled is None:
            if not evaluation.num_targets().any():  # the model's mean is 0 / 0 and tells nothing about the form
                return _without_targets(evaluation)
            settled = self._settle_by_value(evaluation)
        if self._label_smoothing is not None:
            _require_cross_entropy(settled.form, evaluation.loss)
        if settled.form is None:
            return self._of_mean(evaluation)
        logits = _fitting_logits(settled.form, model, batch, evaluation.output)
        if settled.needs_labels is None and _may_call_again(model):
            settled.needs_labels = _logits_need_labels(model, batch, logits)
        return self._rebuilt(settled.form, logits, batch)

    def settle(self, evaluate: Evaluate, microbatches: Sequence[Any], world: World) -> None:
        """Find out the form, and where none fits what the loss averages over; see `Settling`."""
        self._forms.settle(evaluate, microbatches, world)
        without_form = [batch for batch in microbatches if (known := self._forms.of(batch)) is not None and known.form is None]
        self._averages.settle(lambda batch: evaluate(_contradicted_averages, batch), without_form, world)

    def _rebuilt(self, form: LossForm, logits: Tensor, batch: Mapping[str, Any]) -> SampleLosses:
        if self._label_smoothing is None:
            return form(logits, labels_of(batch))
        return form(logits, labels_of(batch), label_smoothing=self._label_smoothing)

    def _of_mean(self, evaluation: LabelledCall) -> SampleLosses:
        """The model's mean times what it is a mean over, where that is not known times its targets."""
        loss = evaluation.loss
        known = self._averages.losses(loss, evaluation.microbatch)
        if known is None:
            counts = evaluation.num_targets()
            total = loss * counts.sum().to(loss.device) if counts.any() else loss.new_zeros(())
            known = SampleLosses(total, counts, None)
        return replace(known, coupled=router_loss(evaluation.output))

    def _settle_by_value(self, evaluation: LabelledCall) -> KnownForm:
        """What the value tells about its layout; kept where that is one form or none, looked at again at the next call else."""
        model, batch = evaluation.model, evaluation.microbatch
        may_call_again = _may_call_again(model)
        is_finite = bool(evaluation.loss.isfinite())
        matching = evaluation.forms_of_loss()
        if not matching and not is_finite and may_call_again:
            matching = forms_of_finite_rows(evaluation)
        settled = KnownForm(matching[0] if matching else None)
        if not matching and may_call_again and current_world().size == 1 and not self._averages.knows(batch):
            self._averages.note(batch, contradicted_averages(_own_mean, model, batch))
        if len(matching) == 1 or (not matching and is_finite):
            self._forms.note(batch, settled)
        return settled


def _own_mean(model: nn.Module, batch: Any) -> Tensor:
    return evaluated(model, batch).loss


def _contradicted_averages(model: nn.Module, batch: Any) -> frozenset[str] | None:
    return contradicted_averages(_own_mean, model, batch)


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


def _without_targets(evaluation: LabelledCall) -> SampleLosses:
    """Losses of a batch without a target: zero through the logits, where these have a form that counts none either.

    Backward passes through parameters that are gathered on use are everybody's, also of a process that has no target.
    """
    batch, loss = evaluation.batch, evaluation.loss
    logits, labels = logits_of(evaluation.output, batch), labels_of(batch)
    forms = candidate_forms(evaluation.model, logits, batch) if logits is not None and labels is not None else []
    possible = (form(logits, labels) for form in forms)
    empty = next((losses for losses in possible if not losses.num_targets.any()), None)
    return without_targets(evaluation.num_targets(), loss.device, loss.dtype) if empty is None else empty
