"""Losses of single samples: whatever the run's loss is, as a sum over rows with its count of valid targets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from curvature_callbacks.batches import batch_size
from curvature_callbacks.errors import ConfigurationError, check_choice
from curvature_callbacks.model.own_loss import OwnLoss
from curvature_callbacks.model.sample_losses import (
    Predictive,
    SampleLosses,
    binary_cross_entropies,
    cross_entropy,
    squared_errors,
)

__all__ = ["Loss", "LossCallable", "LossFunction", "Predictive", "SampleLosses", "TargetLossName", "resolve_loss"]

TargetLossName = Literal["cross_entropy", "mse", "bce"]
LossCallable = Callable[[nn.Module, Any], Tensor]
Loss = TargetLossName | LossCallable | None
LossFunction = Callable[[nn.Module, Any], SampleLosses]


def resolve_loss(loss: Loss, batch: Any) -> LossFunction:
    """The function that gives the `SampleLosses` of any batch shaped like `batch`.

    Args:
        loss: None for the model's own `.loss` (mapping batches), `cross_entropy`, `mse` or `bce` for `(inputs, targets)`
            batches, or `(model, batch) -> scalar mean | (N,) losses`.
        batch: an example.

    Raises:
        ConfigurationError: the loss cannot be determined from these; for None at the first call, when the model gives none.
    """
    if callable(loss):
        return _CallableLoss(loss)
    if loss is not None:
        check_choice("loss", loss, get_args(TargetLossName))
        _require_pair(batch, loss)
        return _TargetLoss(loss)
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
    """A user's function: its value is all that is known, neither single targets nor the likelihood."""

    function: LossCallable

    def __call__(self, model: nn.Module, batch: Any) -> SampleLosses:
        value = self.function(model, batch)
        if not isinstance(value, Tensor):
            raise ConfigurationError(
                f"the loss function returned {type(value).__name__} instead of a tensor: return the mean loss of the batch "
                "or one loss per row."
            )
        size = batch_size(batch)
        ones = torch.ones(size, dtype=torch.int64, device=value.device)
        if value.ndim == 0:
            return SampleLosses(value * size, ones, None)
        if value.shape == (size,):
            return SampleLosses(value.sum(), ones, value)
        raise ConfigurationError(
            f"the loss function returned shape {tuple(value.shape)} for a batch of {size} rows: return a scalar mean or "
            f"({size},) losses."
        )


@final
@dataclass(frozen=True, slots=True)
class _TargetLoss:
    """A standard loss on `(inputs, targets)`: mean over rows, for cross-entropy over the targets that are not ignored."""

    name: TargetLossName

    def __call__(self, model: nn.Module, batch: Any) -> SampleLosses:
        inputs, targets = batch[0], batch[1]
        output = model(inputs)
        logits = getattr(output, "logits", output)
        if self.name == "cross_entropy":
            return cross_entropy(logits.movedim(1, -1) if logits.ndim > 2 else logits, targets)
        return squared_errors(logits, targets) if self.name == "mse" else binary_cross_entropies(logits, targets)


def _require_pair(batch: Any, loss: str) -> None:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ConfigurationError(f"`loss`={loss!r} needs `(inputs, targets)` batches, got {type(batch).__name__}.")
