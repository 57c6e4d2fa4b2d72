"""Losses of single samples: whatever the model's own loss is, as a sum over rows with its count of valid targets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.batches import batch_size
from curvature_callbacks.errors import ConfigurationError, check_choice

TargetLossName = Literal["cross_entropy", "mse", "bce"]
LossCallable = Callable[[nn.Module, Any], Tensor]
Loss = TargetLossName | LossCallable | None

IGNORED: Final = -100  # the label torch and Hugging Face ignore
_MATCH: Final = 1e-4  # relative agreement with the model's own loss; float32 sums differ by about 1e-6


@final
@dataclass(frozen=True, slots=True, eq=False)
class SampleLosses:
    """Losses of one microbatch; the objective is `sum total / sum num_targets` over microbatches.

    Attributes:
        total: 0-d, `sum_i l_i` with `l_i` the sum over the valid targets of sample i, differentiable.
        num_targets: (N,) int64, valid targets `n_i`; 1 per row where the loss is a mean over rows.
        per_sample: (N,) `l_i`, or None where the loss is only known as the batch's mean.
    """

    total: Tensor
    num_targets: Tensor
    per_sample: Tensor | None


LossFunction = Callable[[nn.Module, Any], SampleLosses]
_Form = Callable[[Any, Mapping[str, Any]], SampleLosses]


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
    return _OwnLoss()


@final
@dataclass(frozen=True, slots=True)
class _CallableLoss:
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
            return _cross_entropy(logits.movedim(1, -1) if logits.ndim > 2 else logits, targets)
        return _squared_errors(logits, targets) if self.name == "mse" else _binary_cross_entropies(logits, targets)


@final
class _OwnLoss:
    """The model's own loss, rebuilt from its logits in whichever standard form gives the value of `.loss`.

    Names do not tell shift, head and problem type apart; values do. The form is chosen at the first call and kept; where
    none fits, the model's mean loss times its targets is used.
    """

    def __init__(self) -> None:
        self._form: _Form | None = None

    def __call__(self, model: nn.Module, batch: Any) -> SampleLosses:
        output = model(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ConfigurationError(
                "the model returns no `.loss` for the drawn microbatch (keys: " + ", ".join(map(str, batch)) + "): the loss "
                "cannot be determined. Add `labels` to the batch or pass a loss function."
            )
        if self._form is not None:
            return self._form(output, batch)
        counts = _count_targets(batch, shifted=_is_causal(model))
        if not counts.any():  # the model's mean is 0 / 0 and tells nothing about the form
            return SampleLosses(loss.new_zeros(()), counts, None)
        self._form = _matching_form(model, output, batch)
        return self._form(output, batch)


def _matching_form(model: nn.Module, output: Any, batch: Mapping[str, Any]) -> "_Form":
    logits, labels = getattr(output, "logits", None), batch.get("labels")
    if isinstance(logits, Tensor) and isinstance(labels, Tensor):
        for form in _forms(model, logits, labels):
            rebuilt = form(logits.detach(), labels)
            if _agrees(rebuilt.total / rebuilt.num_targets.sum(), output.loss.detach()):
                return lambda output, batch: form(output.logits, batch["labels"])
    shifted = _is_causal(model)
    return lambda output, batch: _mean_times_targets(output.loss, _count_targets(batch, shifted=shifted))


def _mean_times_targets(loss: Tensor, counts: Tensor) -> SampleLosses:
    total = loss * counts.sum().to(loss.device) if counts.any() else loss.new_zeros(())
    return SampleLosses(total, counts, None)


def _forms(model: nn.Module, logits: Tensor, labels: Tensor) -> list[Callable[[Tensor, Tensor], SampleLosses]]:
    if labels.is_floating_point() and labels.numel() == logits.numel():
        return [_squared_errors, _binary_cross_entropies]
    if labels.is_floating_point():
        return []
    if logits.ndim == labels.ndim + 1 == 3 and logits.shape[:2] == labels.shape:
        return [_shifted_cross_entropy, _cross_entropy] if _is_causal(model) else [_cross_entropy, _shifted_cross_entropy]
    if logits.ndim == labels.ndim + 1 == 2 and len(logits) == len(labels):
        return [_cross_entropy]
    return []


def _is_causal(model: nn.Module) -> bool:
    name = type(model).__name__
    return "CausalLM" in name or "LMHead" in name


def _agrees(value: Tensor, reference: Tensor) -> bool:
    return bool((value - reference).abs() <= _MATCH * reference.abs())


def _cross_entropy(logits: Tensor, labels: Tensor) -> SampleLosses:
    """Cross-entropy of `logits` (N, ..., C) at `labels` (N, ...), summed over each row's valid positions."""
    losses = F.cross_entropy(logits.flatten(0, -2), labels.to(logits.device).flatten(), ignore_index=IGNORED, reduction="none")
    valid = (labels != IGNORED).reshape(len(labels), -1).sum(1)
    per_sample = losses.reshape(len(labels), -1).sum(1)
    return SampleLosses(per_sample.sum(), valid, per_sample)


def _shifted_cross_entropy(logits: Tensor, labels: Tensor) -> SampleLosses:
    """Position t predicts label t + 1, as causal language models do inside themselves."""
    return _cross_entropy(logits[:, :-1], labels[:, 1:])


def _row_means(elements: Tensor) -> SampleLosses:
    per_sample = elements.reshape(len(elements), -1).mean(1)
    return SampleLosses(per_sample.sum(), torch.ones_like(per_sample, dtype=torch.int64), per_sample)


def _squared_errors(logits: Tensor, labels: Tensor) -> SampleLosses:
    return _row_means(F.mse_loss(logits, labels.to(logits).reshape(logits.shape), reduction="none"))


def _binary_cross_entropies(logits: Tensor, labels: Tensor) -> SampleLosses:
    return _row_means(F.binary_cross_entropy_with_logits(logits, labels.to(logits).reshape(logits.shape), reduction="none"))


def _count_targets(batch: Mapping[str, Any], *, shifted: bool) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim == 0:
        return torch.ones(batch_size(batch), dtype=torch.int64)
    valid = labels[:, 1:] if shifted and labels.ndim > 1 else labels
    return (valid != IGNORED).reshape(len(labels), -1).sum(1)


def _require_pair(batch: Any, loss: str) -> None:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ConfigurationError(f"`loss`={loss!r} needs `(inputs, targets)` batches, got {type(batch).__name__}.")
