"""The run's loss, however it was given, as a function to `SampleLosses`: a sum over rows with its count of valid targets."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeGuard, final, get_args

import torch
from torch import Tensor, nn

from curvature_callbacks.errors import ConfigurationError, check_choice
from curvature_callbacks.layout import counted_rows
from curvature_callbacks.library_internals.modules import is_criterion
from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.model.loss.averages import Evaluate, Settling
from curvature_callbacks.model.loss.own import OwnLoss
from curvature_callbacks.model.loss.sample_losses import (
    IGNORED,
    Predictive,
    SampleLosses,
    binary_cross_entropies,
    cross_entropies,
    squared_errors,
)
from curvature_callbacks.processes.world import World

__all__ = [
    "Criterion",
    "Loss",
    "LossCallable",
    "LossFunction",
    "Predictive",
    "SampleLosses",
    "TargetLossName",
    "is_function",
    "resolve_loss",
]

TargetLossName = Literal["cross_entropy", "mse", "bce"]
Criterion = nn.CrossEntropyLoss | nn.MSELoss | nn.BCEWithLogitsLoss
LossCallable = Callable[[nn.Module, Any], Tensor | SampleLosses]  # the latter from the package itself
Loss = TargetLossName | Criterion | LossCallable | None
LossFunction = Callable[[nn.Module, Any], SampleLosses]  # of a `Microbatch`, or of what one is made of

_CRITERIA: Final[Mapping[type[nn.Module], TargetLossName]] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.MSELoss: "mse",
    nn.BCEWithLogitsLoss: "bce",
}
_FORMS: Final[Mapping[TargetLossName, Callable[[Tensor, Tensor], SampleLosses]]] = {
    "cross_entropy": cross_entropies,
    "mse": squared_errors,
    "bce": binary_cross_entropies,
}


class MicrobatchLoss(ABC):
    """A loss function of the package's own that is called with the `Microbatch`, not with its content."""

    @abstractmethod
    def __call__(self, model: nn.Module, microbatch: Microbatch) -> Any:
        """What a `LossCallable` returns."""


def is_function(loss: Loss) -> TypeGuard[LossCallable]:
    """Whether it is a function of the user's, and no criterion of torch (which all derive from one class)."""
    return callable(loss) and not is_criterion(loss)


def resolve_loss(loss: Loss, batch: Any) -> LossFunction:
    """The function that gives the `SampleLosses` of any batch shaped like `batch`.

    Args:
        loss: None for the model's own `.loss` (mapping batches), `cross_entropy`, `mse` or `bce` for `(inputs, targets)`
            batches, or `(model, batch) -> scalar mean | (N,) losses`. PyTorch's `CrossEntropyLoss`, `MSELoss` and
            `BCEWithLogitsLoss` with `reduction="mean"` and without weights mean the same as these names, the first with its
            `label_smoothing` and `ignore_index`. It may also come with mapping batches: then it takes the positions and
            the shift of the model's own cross-entropy and smooths its labels.
        batch: the content of a microbatch, as an example.

    Raises:
        ConfigurationError: the loss cannot be determined from these; for None at the first call, when the model gives none.
    """
    if is_criterion(loss):
        return _criterion_loss(loss, batch)
    if callable(loss):
        return _CallableLoss(loss)
    if loss is not None:
        check_choice("loss", loss, get_args(TargetLossName))
        return _target_loss(loss, loss, batch)
    if not isinstance(batch, Mapping):
        raise ConfigurationError(
            f"the loss of a {type(batch).__name__} batch cannot be determined: pass a loss function "
            "`(model, batch) -> scalar mean or (N,) losses`, or the name of one "
            f"({', '.join(get_args(TargetLossName))}) for `(inputs, targets)` batches."
        )
    return OwnLoss()


@final
@dataclass(frozen=True, slots=True)
class _CallableLoss:
    """A user's loss function. Only its value is known: no per-target losses, no likelihood."""

    function: LossCallable

    def settle(self, evaluate: Evaluate, microbatches: Sequence[Any], world: World) -> None:
        """Of a loss of the package's own that has something to settle; a user's is what it says."""
        if isinstance(self.function, Settling):
            self.function.settle(evaluate, microbatches, world)

    def __call__(self, model: nn.Module, batch: Any) -> SampleLosses:
        microbatch = as_microbatch(batch)
        wants_rows = isinstance(self.function, MicrobatchLoss)
        value = self.function(model, microbatch if wants_rows else microbatch.content)
        if isinstance(value, SampleLosses):
            return value
        if not isinstance(value, Tensor):
            raise ConfigurationError(
                f"the loss function returned {type(value).__name__} instead of a tensor: return the mean loss of the batch "
                "or one loss per row."
            )
        size = microbatch.num_rows
        ones = torch.ones(size, dtype=torch.int64, device=value.device)
        if value.ndim == 0 or not microbatch.are_rows_known:
            return SampleLosses(value.mean() * size, ones, None)
        if value.shape == (size,):
            return SampleLosses(value.sum(), ones, value)
        if value.ndim == 1 and len(value) == counted_rows(microbatch.content):  # of which rows were made that were not drawn
            return SampleLosses(value.mean() * size, ones, None)
        raise ConfigurationError(
            f"the loss function returned shape {tuple(value.shape)} for a batch of {size} rows: return a scalar mean or "
            f"({size},) losses."
        )


@final
@dataclass(frozen=True, slots=True)
class _TargetLoss:
    """A standard loss on `(inputs, targets)`: mean over rows, for cross-entropy over the targets that are not ignored."""

    form: Callable[[Tensor, Tensor], SampleLosses]
    has_classes: bool  # on axis 1 of the logits, and of targets that are probabilities

    def __call__(self, model: nn.Module, batch: Any) -> SampleLosses:
        content = as_microbatch(batch).content
        inputs, targets = content[0], content[1]
        output = model(inputs)
        logits = getattr(output, "logits", output)
        if self.has_classes:
            return self.form(_classes_last(logits), _classes_last(targets) if targets.is_floating_point() else targets)
        return self.form(logits, targets)


def _classes_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1) if tensor.ndim > 2 else tensor


def _criterion_loss(criterion: nn.Module, batch: Any) -> LossFunction:
    """The loss a criterion of PyTorch stands for, where it is a mean over targets that all weigh the same."""
    name = _CRITERIA.get(type(criterion))
    if name is None:
        raise ConfigurationError(
            f"`loss` must be CrossEntropyLoss, MSELoss or BCEWithLogitsLoss where it is a criterion of PyTorch, got "
            f"{criterion!r}: wrap it in a function `(model, batch) -> scalar mean or (N,) losses`."
        )
    _require_plain_mean(criterion)
    if not isinstance(criterion, nn.CrossEntropyLoss):
        return _target_loss(name, criterion, batch)
    smoothing, ignored = criterion.label_smoothing, criterion.ignore_index
    if not 0 <= smoothing <= 1:
        raise ConfigurationError(f"`label_smoothing` of `loss` must lie between 0 and 1, got {smoothing}.")
    if not isinstance(batch, Mapping):
        _require_pairs(criterion, batch)
        return _TargetLoss(partial(cross_entropies, label_smoothing=smoothing, ignore_index=ignored), has_classes=True)
    if ignored != IGNORED:
        raise ConfigurationError(
            f"`ignore_index` of `loss` must be {IGNORED} on mapping batches, as in the model's own loss, got {ignored}: let "
            f"the collator mark ignored labels by {IGNORED}, or pass a loss function."
        )
    return OwnLoss(label_smoothing=smoothing)


def _require_plain_mean(criterion: nn.Module) -> None:
    weights = [name for name in ("weight", "pos_weight") if getattr(criterion, name, None) is not None]
    if weights:
        raise ConfigurationError(
            f"`loss`={criterion!r} has `{weights[0]}`: single targets would not weigh the same, and the number of targets "
            "would not be what the mean divides by. Pass a function `(model, batch) -> scalar mean or (N,) losses`."
        )
    if criterion.reduction != "mean":
        raise ConfigurationError(
            f"`reduction` of `loss`={criterion!r} must be 'mean', got {criterion.reduction!r}: curvature is that of the mean "
            "loss, so that it does not grow with the batch."
        )


def _target_loss(name: TargetLossName, loss: Loss, batch: Any) -> _TargetLoss:
    _require_pairs(loss, batch)
    return _TargetLoss(_FORMS[name], has_classes=name == "cross_entropy")


def _require_pairs(loss: Loss, batch: Any) -> None:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ConfigurationError(f"`loss`={loss!r} needs `(inputs, targets)` batches, got {type(batch).__name__}.")
