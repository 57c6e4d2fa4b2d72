"""KnownForms: the standard forms of a model's own loss, as far as the probes of a run have proved them."""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Final, final

from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.model.loss.averages import Evaluate, has_ragged_rows, label_layout
from curvature_callbacks.model.loss.evidence import telling_rows
from curvature_callbacks.model.loss.own_evaluation import ToldForms, evaluated
from curvature_callbacks.model.loss.own_forms import LossForm
from curvature_callbacks.processes.world import World

_ENOUGH: Final = 2  # probes that have to find the same form

_logger = logging.getLogger("curvature_callbacks")


@final
@dataclass(slots=True)
class KnownForm:
    """What is known about batches of one layout.

    Attributes:
        form: of the loss; None where no standard one fits and the model's mean has to do.
        needs_labels: whether the logits of the form do; None until it was tried.
        num_proofs: probes that found this form, and no other, by value and gradient.
        holds_ragged: whether one of them had rows with different numbers of labels.
    """

    form: LossForm | None
    needs_labels: bool | None = None
    num_proofs: int = 0
    holds_ragged: bool = False


@final
class KnownForms:
    """The form of a run's loss for every layout of batches."""

    def __init__(self) -> None:
        self._known: dict[Hashable, KnownForm] = {}

    def of(self, batch: Any) -> KnownForm | None:
        """What is known of batches like it."""
        return self._known.get(label_layout(batch))

    def note(self, batch: Any, known: KnownForm) -> None:
        """Keep what one process has found without a proof."""
        self._known[label_layout(batch)] = known

    def settle(self, evaluate: Evaluate, microbatches: Sequence[Any], world: World) -> None:
        """Find out the form, and where none fits what the loss averages over; see `Settling`."""
        undecided: dict[Hashable, ToldForms] = {}
        seen: set[Hashable] = set()
        for number in range(max(world.gathered(len(microbatches)))):
            batch = microbatches[number] if number < len(microbatches) else None
            if not world.anywhere(batch is not None and self._is_due(batch, seen)):
                continue
            found = None if batch is None else _told(evaluate, batch)
            for layout, told, is_ragged in _agreed_by_layout(world.gathered(found)):
                seen.add(layout)
                undecided.pop(layout, None)
                if len(told.forms) > 1:
                    undecided[layout] = told
                else:
                    self._take_in(layout, told, is_ragged=is_ragged)
        for layout, told in undecided.items():
            self._take_in_several(layout, told)

    def _is_due(self, batch: Any, seen: set[Hashable]) -> bool:
        layout = label_layout(batch)
        settled = self._known.get(layout)
        if settled is None or not settled.num_proofs:
            return True
        is_new_here = layout not in seen and settled.num_proofs < _ENOUGH
        return is_new_here or (has_ragged_rows(batch) and not settled.holds_ragged)

    def _take_in(self, layout: Hashable, told: ToldForms, *, is_ragged: bool) -> None:
        form, before = next(iter(told.forms), None), self._known.get(layout)
        if before is None or before.form is not form:
            if before is not None and before.num_proofs:
                _warn_of_change(before.form, form)
            before = self._known[layout] = KnownForm(form)
        before.num_proofs += 1
        before.holds_ragged |= is_ragged

    def _take_in_several(self, layout: Hashable, told: ToldForms) -> None:
        """Take the likely one where all of them have the same gradients, so that no number tells them apart."""
        before = self._known.get(layout)
        if before is not None and before.num_proofs and before.form in told.forms:
            return
        if not told.has_gradient:
            raise ProbeError(
                f"the model's own loss may be {_in_words(told.forms)}: all give its value, it does not come from `.logits` and "
                "its gradient was not compared. The next probe looks again; or pass a loss function."
            )
        self._known[layout] = KnownForm(told.forms[0])


def _told(evaluate: Evaluate, batch: Any) -> tuple[Hashable, ToldForms, bool] | None:
    """The layout of a batch, the forms that a few rows of it allow, and whether these differ in their number of labels."""
    rows = telling_rows(batch)
    told = evaluate(lambda model, rows: evaluated(model, rows).told_forms(), rows)
    return None if told is None else (label_layout(batch), told, has_ragged_rows(rows))


def _agreed_by_layout(found: Sequence[tuple[Hashable, ToldForms, bool] | None]) -> list[tuple[Hashable, ToldForms, bool]]:
    """What all processes together tell of each layout.

    Raises:
        ConfigurationError: they contradict each other.
    """
    by_layout: dict[Hashable, list[tuple[ToldForms, bool]]] = {}
    for each in found:
        if each is not None:
            by_layout.setdefault(each[0], []).append(each[1:])
    joined = []
    for layout, told in by_layout.items():
        sets = [each.forms for each, _ in told]
        common = reduce(lambda left, right: tuple(form for form in left if form in right), sets)
        if not common and all(sets):
            raise ConfigurationError(
                f"processes find different forms of the model's own loss ({'; '.join(sorted(map(_in_words, sets)))}): pass a "
                "loss function."
            )
        has_gradient = any(each.has_gradient for each, _ in told)
        joined.append((layout, ToldForms(common, has_gradient), any(is_ragged for _, is_ragged in told)))
    return joined


def _warn_of_change(before: LossForm | None, now: LossForm | None) -> None:
    _logger.warning(
        "the model's own loss is found to be %s and not %s, as earlier probes of this run had it: their numbers are those of "
        "another function.",
        _in_words([now]),
        _in_words([before]),
    )


def _in_words(forms: Sequence[LossForm | None]) -> str:
    return " or ".join("no standard one" if form is None else f"`{form.__name__}`" for form in forms) or "no standard one"
