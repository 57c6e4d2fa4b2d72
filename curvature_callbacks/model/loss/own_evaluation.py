"""LabelledCall: one call of a model with labels, and the standard forms that its loss may have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor, nn

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.model.loss.own_forms import LossForm, count_targets, forms_with_gradient, logits_of, matching_forms
from curvature_callbacks.processes.fsdp import passes_are_collective

_MATCH: Final = 1e-4  # relative agreement with the model's own loss; float32 sums differ by about 1e-6
_EXACT_MATCH: Final = 3e-6  # where a router's loss, usually a thousandth of it, may be in it
_ROUTER_LOSSES: Final = ("aux_loss", "z_loss")  # how the outputs of mixtures of experts name them


@final
@dataclass(frozen=True, slots=True, eq=False)
class LabelledCall:
    """One call of the model with labels: its output and its own mean loss, 0-d."""

    model: nn.Module
    microbatch: Microbatch
    output: Any
    loss: Tensor

    @property
    def batch(self) -> Mapping[str, Any]:
        """What the model was called with."""
        content: Mapping[str, Any] = self.microbatch.content
        return content

    def num_targets(self) -> Tensor:
        """(N,) valid targets, by the look of labels and model."""
        return count_targets(self.model, self.output, self.batch, num_rows=self.microbatch.num_rows)

    def forms_of_loss(self) -> list[LossForm]:
        """The standard forms that give the value of the loss."""
        match = _MATCH if router_loss(self.output) is None else _EXACT_MATCH
        return matching_forms(self.model, self.output, self.batch, self.loss.detach(), match=match)

    def told_forms(self) -> "ToldForms | None":
        """What value and gradient tell about the form; None where there is no target, or no finite loss."""
        if not self.num_targets().any() or not self.loss.isfinite():
            return None
        leaves = [] if passes_are_collective(self.model) else [each for each in self.model.parameters() if each.requires_grad]
        matching = self.forms_of_loss()
        proven = forms_with_gradient(matching, self.output, self.batch, self.loss, leaves) if matching else []
        return ToldForms(tuple(matching if proven is None else proven), has_gradient=proven is not None)


@final
@dataclass(frozen=True, slots=True)
class ToldForms:
    """The standard forms that a loss may have; `has_gradient` where its gradient by the logits was compared as well."""

    forms: tuple[LossForm, ...]
    has_gradient: bool


def evaluated(model: nn.Module, batch: Any) -> LabelledCall:
    """The evaluation of `batch`, whose content is a mapping that the model is called with.

    Raises:
        ConfigurationError: the model returns no loss.
    """
    microbatch = as_microbatch(batch)
    output = model(**microbatch.content)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            "the model returns no `.loss` for the drawn microbatch (keys: "
            + ", ".join(map(str, microbatch.content))
            + "): the loss "
            "cannot be determined. Add `labels` to the batch or pass a loss function."
        )
    return LabelledCall(model, microbatch, output, loss)


def forms_of_finite_rows(evaluation: LabelledCall) -> list[LossForm]:
    """The forms that match on the rows whose logits are finite: one bad row hides the value of all others.

    Cost: one forward pass over these.
    """
    microbatch = evaluation.microbatch
    logits = logits_of(evaluation.output, evaluation.batch)
    if logits is None or len(logits) != microbatch.num_rows or microbatch.is_whole:
        return []
    finite = logits.flatten(1).isfinite().all(1)
    if not finite.any():
        return []
    return evaluated(evaluation.model, microbatch.take(finite.nonzero()[:, 0])).forms_of_loss()


def router_loss(output: Any) -> str | None:
    """The name of a loss that balances the experts over the whole batch, where the model's own has one in it.

    Products of means over all rows: as a thousandth of the loss, which is usual, too small to show in the value of it.
    """
    parts = getattr(output, "__dict__", {}).items()
    return next((name for name, value in parts if name.endswith(_ROUTER_LOSSES) and isinstance(value, Tensor)), None)
