"""SampleLosses: losses of single samples and targets, with the likelihood behind them; the standard forms.

A form takes logits and labels and gives `SampleLosses`; its name is the plural of its loss, because it gives one per sample.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks.microbatch import Microbatch

IGNORED: Final = -100  # the label torch and Hugging Face ignore

Likelihood = Literal["categorical", "gaussian", "bernoulli"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Predictive:
    """The distribution of a target that a loss is the negative log-likelihood of.

    Scaled so that the Fisher of the drawn labels' gradients is the GGN of the loss, output by output:
    `categorical`, `l = cross-entropy`: labels drawn from `softmax(logits)`;
    `gaussian`, `l = mean over D outputs of (f - y)^2`: `y = f + sigma eps` with `sigma^2 = D / 2`;
    `bernoulli`, `l = mean over D outputs of the binary cross-entropy`: every output drawn by itself, the gradient
    `J'(p - y) / sqrt(D)`, which is `sqrt(D)` times that of `l`.

    Attributes:
        likelihood: the family.
        logits: (N, M, C) outputs of M targets, differentiable; M = 1 and C = D for `gaussian` and `bernoulli`.
        valid: (N, M) bool, which targets count.
    """

    likelihood: Likelihood
    logits: Tensor
    valid: Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class SampleLosses:
    """Losses of one microbatch; the objective is `sum total / sum num_targets` over microbatches.

    Attributes:
        total: 0-d, `sum_i l_i` with `l_i` the sum over the valid targets of sample i, differentiable.
        num_targets: (N,) int64, valid targets `n_i`; 1 per row where the loss is a mean over rows.
        per_sample: (N,) `l_i`, or None where the loss is only known as the batch's mean.
        per_target: (N, M) losses of single targets, zero at those that do not count, `per_sample = per_target.sum(1)`;
            None where single targets are not told apart.
        predictive: what labels can be drawn from; None where the likelihood of the loss is not known.
        coupled: the name of a part that is one of all rows together and makes their gradients no sum over rows; None where
            none is known.
        is_sum: whether the loss that trains is `total` itself, of which the mean over rows is measured.
    """

    total: Tensor
    num_targets: Tensor
    per_sample: Tensor | None
    per_target: Tensor | None = None
    predictive: Predictive | None = None
    coupled: str | None = None
    is_sum: bool = False

    def detached(self) -> "SampleLosses":
        """The same values without what they were computed from."""
        predictive = self.predictive
        return replace(
            self,
            total=self.total.detach(),
            per_sample=None if self.per_sample is None else self.per_sample.detach(),
            per_target=None if self.per_target is None else self.per_target.detach(),
            predictive=None if predictive is None else replace(predictive, logits=predictive.logits.detach()),
        )


def cross_entropies(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = IGNORED
) -> SampleLosses:
    """Cross-entropy of `logits` (N, ..., C) at `labels` (N, ...), summed over each row's valid positions.

    Labels that are no integers are the classes' probabilities, (N, ..., C), and every one of them counts. Smoothing mixes a
    share of the uniform distribution into the labels: the losses change, their GGN and the predictive do not, because the
    second derivative by the logits does not see the labels.
    """
    N, C = len(labels), logits.shape[-1]
    logits = logits.reshape(N, -1, C)
    if labels.is_floating_point():
        targets, valid = labels.to(logits).reshape(-1, C), torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    else:
        targets = labels.to(logits.device).flatten()
        valid = (targets != ignore_index).reshape(N, -1)
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    return _of_targets(losses.reshape(N, -1), Predictive("categorical", logits, valid))


def shifted_cross_entropies(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> SampleLosses:
    """Position t predicts label t + 1, as causal language models do inside themselves.

    The labels are shifted, not the logits: a slice of those would be copied, forward and backward.
    """
    return cross_entropies(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED), label_smoothing=label_smoothing)


def span_cross_entropies(logits: Tensor, positions: Tensor) -> SampleLosses:
    """Cross-entropy of `logits` (N, 2, T) at `positions` (N, 2): start and end of a span, two targets of the same row.

    As Hugging Face has it, a position beyond T does not count and a negative one is the first. Every target that counts
    weighs the same: the mean of the means over starts and over ends, where these count equally often.
    """
    T = logits.shape[-1]
    return cross_entropies(logits, torch.where(positions < T, positions.clamp(min=0), IGNORED))


def squared_errors(logits: Tensor, labels: Tensor) -> SampleLosses:
    """Mean squared error of every row."""
    elements = F.mse_loss(logits, labels.to(logits).reshape(logits.shape), reduction="none")
    return _row_means(elements, logits, "gaussian")


def binary_cross_entropies(logits: Tensor, labels: Tensor) -> SampleLosses:
    """Mean binary cross-entropy of every row."""
    elements = F.binary_cross_entropy_with_logits(logits, labels.to(logits).reshape(logits.shape), reduction="none")
    return _row_means(elements, logits, "bernoulli")


def without_targets(num_targets: Tensor, device: torch.device, dtype: torch.dtype) -> SampleLosses:
    """A microbatch without a single valid target: nothing to sum, nothing to draw."""
    N = len(num_targets)
    per_target = torch.zeros(N, 1, device=device, dtype=dtype)
    valid = torch.zeros(N, 1, device=device, dtype=torch.bool)
    predictive = Predictive("categorical", per_target[:, :, None], valid)
    return SampleLosses(per_target.sum(), num_targets, per_target[:, 0], per_target, predictive)


def of_rows(losses: SampleLosses, microbatch: Microbatch) -> SampleLosses:
    """The losses of a microbatch by its rows; only their total is known where the loss has other rows than were drawn."""
    counts, num_rows = losses.num_targets, microbatch.num_rows
    coupled = losses.coupled if microbatch.are_rows_known else "how many rows its batches have is not known"
    if len(counts) == num_rows and coupled == losses.coupled:
        return losses
    return SampleLosses(losses.total, counts_of_rows(counts, num_rows), None, coupled=coupled, is_sum=losses.is_sum)


def counts_of_rows(counts: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) valid targets: `counts` itself, or its sum shared out as evenly as can be where that is of other rows."""
    if len(counts) == num_rows:
        return counts
    total = int(counts.sum())
    return total // num_rows + (torch.arange(num_rows, device=counts.device) < total % num_rows).to(torch.int64)


def _row_means(elements: Tensor, logits: Tensor, likelihood: Likelihood) -> SampleLosses:
    N = len(elements)
    valid = torch.ones(N, 1, dtype=torch.bool, device=elements.device)
    means = elements.reshape(N, -1).mean(1, keepdim=True)
    return _of_targets(means, Predictive(likelihood, logits.reshape(N, 1, -1), valid))


def _of_targets(per_target: Tensor, predictive: Predictive) -> SampleLosses:
    per_sample = per_target.sum(1)
    return SampleLosses(per_sample.sum(), predictive.valid.sum(1), per_sample, per_target, predictive)
