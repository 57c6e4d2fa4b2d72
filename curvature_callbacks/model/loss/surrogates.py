"""Surrogates: what is differentiated, pass by pass, so that its per-sample gradients are those of a type of Fisher."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, final

import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.model.loss.draws import chosen_targets, drawn_labels
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.sample_losses import IGNORED, Predictive, SampleLosses

_UNKNOWN: Final = (
    "a loss function gives a mean or one loss per row, and the model's own `.loss` may match no standard form. Use "
    "`fisher`='empirical' with `sample_unit`='sequence', or let the loss be the model's own or a named one (cross_entropy, "
    "mse, bce)."
)

_MAX_PASSES: Final = 1024  # backward passes of an exact Fisher beyond which `sampled` is the sane choice


class Surrogate(Protocol):
    """What one backward pass differentiates.

    It holds labels, noise and indices only and recomputes everything else from the losses it is called with, which may be
    of another forward pass.
    """

    @property
    def weights(self) -> Tensor:
        """(N,) float64: `g~_i = sqrt(weights_i) g_i`, for the mean gradient `sum_s sqrt(weights_s) g~_s / normaliser`.

        Zero where that mean is zero by definition (`exact`), and for inactive rows.
        """
        ...

    @property
    def active(self) -> Tensor:
        """(N,) bool: rows that give a pseudo-sample in this pass."""
        ...

    def __call__(self, losses: SampleLosses) -> Tensor:
        """(N,) differentiable: the gradient of entry i is `g~_i`, zero for an inactive row."""
        ...

    def restricted(self, rows: Tensor) -> "Surrogate":
        """The surrogate of some rows, an index tensor, with the same draws."""
        ...


def surrogates(fisher_type: FisherType, losses: SampleLosses, *, seed: int) -> list[Surrogate]:
    """The passes whose pseudo-samples make up the Fisher of one microbatch; at least one, if need be without active rows.

    Draws come from a CPU generator of `seed` (a different one for every microbatch): the global generators are not touched
    and the draws are the same on every device.

    Args:
        fisher_type: whose pseudo-samples they are.
        losses: of one forward pass over the microbatch.
        seed: of the draws.

    Raises:
        ConfigurationError: the loss does not tell single targets or its likelihood, or an exact Fisher needs too many passes.

    Cost: passes: 1 for `empirical` over sequences, `num_draws` for `sampled`, times `min(num_targets, max n_i)` for tokens;
    for `exact` positions with a valid target times classes, or the number of outputs. Memory: 48 MiB while labels are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    if fisher_type.fisher == "exact":
        return [*_exact(_predictive(losses))]
    if fisher_type.fisher == "sampled":
        predictive = _predictive(losses)
        return [drawn for _ in range(fisher_type.num_draws) for drawn in _drawn(fisher_type, predictive, generator)]
    if fisher_type.sample_unit == "token":
        return [*_given_targets(fisher_type, losses, generator)]
    return [_given_rows(losses)]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Surrogate:
    """`scale * value(losses, draws)` at the active rows; `draws` (N, ...) is whatever was drawn for each row."""

    weights: Tensor
    active: Tensor
    scale: Tensor  # (N,) float64
    draws: Tensor
    value: Callable[[SampleLosses, Tensor], Tensor]

    def __call__(self, losses: SampleLosses) -> Tensor:
        values = self.value(losses, self.draws) * self.scale.to(losses.total.dtype)
        return torch.where(self.active, values, torch.zeros_like(values))

    def restricted(self, rows: Tensor) -> "_Surrogate":
        rows = rows.to(self.active.device)
        return _Surrogate(
            weights=self.weights[rows],
            active=self.active[rows],
            scale=self.scale[rows],
            draws=self.draws[rows],
            value=self.value,
        )


def _given_rows(losses: SampleLosses) -> _Surrogate:
    """The losses as they are, of every row: one without targets has the gradient zero."""
    per_sample = _rows_known(losses)
    ones = torch.ones(len(per_sample), dtype=torch.float64, device=per_sample.device)
    return _Surrogate(weights=ones, active=ones.bool(), scale=ones, draws=ones, value=lambda again, _: _rows_known(again))


def _given_targets(fisher_type: FisherType, losses: SampleLosses, generator: torch.Generator) -> Iterator[_Surrogate]:
    _targets_known(losses)
    for targets, active, weights in chosen_targets(_predictive(losses).valid, fisher_type.num_targets, generator):
        yield _weighted(active, weights, draws=targets, value=_loss_at)


def _drawn(fisher_type: FisherType, predictive: Predictive, generator: torch.Generator) -> Iterator[_Surrogate]:
    """One draw of labels for every row or chosen target."""
    active = predictive.valid.any(1)
    if predictive.likelihood == "gaussian":
        noise = torch.randn(_outputs(predictive), generator=generator, dtype=torch.float64)
        yield _weighted(active, active.double(), draws=noise.to(predictive.logits), value=_noise_product)
    elif predictive.likelihood == "bernoulli":
        uniform = torch.rand(_outputs(predictive), generator=generator, dtype=torch.float64).to(active.device)
        labels = uniform < predictive.logits.detach()[:, 0].double().sigmoid()
        yield _weighted(active, active.double(), draws=labels, value=_binary_loss_of_labels)
    elif fisher_type.sample_unit == "sequence":
        rows, positions = predictive.valid.nonzero(as_tuple=True)
        labels = torch.full_like(predictive.valid, IGNORED, dtype=torch.int64)
        labels[rows, positions] = drawn_labels(predictive.logits, rows, positions, generator)
        yield _weighted(active, active.double(), draws=labels, value=_loss_of_labels)
    else:
        for targets, chosen, weights in chosen_targets(predictive.valid, fisher_type.num_targets, generator):
            rows = chosen.nonzero()[:, 0]
            labels = torch.zeros_like(targets)
            labels[rows] = drawn_labels(predictive.logits, rows, targets[rows], generator)
            yield _weighted(chosen, weights, draws=torch.stack([targets, labels], 1), value=_loss_at_of_label)


def _exact(predictive: Predictive) -> Iterator[_Surrogate]:
    """One pass for every position and class: `sqrt(p_c) grad(-log p_c)`; for every output where rows are means of those."""
    C = predictive.logits.shape[-1]
    positions = predictive.valid.any(0).nonzero()[:, 0].tolist()
    if len(positions) * C > _MAX_PASSES:
        raise ConfigurationError(
            f"`fisher`='exact' would take {len(positions) * C} backward passes ({len(positions)} positions times {C} outputs) "
            f"a microbatch, more than {_MAX_PASSES}: use 'sampled'."
        )
    value = {"categorical": _class_share, "gaussian": _output_share, "bernoulli": _binary_share}[predictive.likelihood]
    for position, output in [(position, output) for position in positions for output in range(C)] or [(0, 0)]:
        active = predictive.valid[:, position]
        yield _Surrogate(
            weights=torch.zeros_like(active, dtype=torch.float64),
            active=active,
            scale=torch.ones_like(active, dtype=torch.float64),
            draws=active,
            value=partial(value, position=position, output=output),
        )


def _weighted(active: Tensor, weights: Tensor, *, draws: Tensor, value: Callable[[SampleLosses, Tensor], Tensor]) -> _Surrogate:
    return _Surrogate(weights=weights, active=active, scale=weights.sqrt(), draws=draws, value=value)


def _loss_at(losses: SampleLosses, targets: Tensor) -> Tensor:
    return _targets_known(losses).gather(1, targets[:, None])[:, 0]


def _loss_at_of_label(losses: SampleLosses, draws: Tensor) -> Tensor:
    logits = _predictive(losses).logits
    rows = torch.arange(len(draws), device=draws.device)
    return F.cross_entropy(logits[rows, draws[:, 0]], draws[:, 1], reduction="none")


def _loss_of_labels(losses: SampleLosses, labels: Tensor) -> Tensor:
    logits = _predictive(losses).logits
    losses_of_labels = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses_of_labels.reshape(labels.shape).sum(1)


def _noise_product(losses: SampleLosses, noise: Tensor) -> Tensor:
    """`grad(l_i) = (2/D) J' (f - y)` with `f - y = -sqrt(D/2) eps`, up to the sign."""
    outputs = _predictive(losses).logits[:, 0]
    return (outputs * noise).sum(1) * math.sqrt(2 / outputs.shape[1])


def _binary_loss_of_labels(losses: SampleLosses, labels: Tensor) -> Tensor:
    outputs = _predictive(losses).logits[:, 0]
    losses_of_labels = F.binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="none")
    return losses_of_labels.sum(1) / math.sqrt(outputs.shape[1])


def _class_share(losses: SampleLosses, _: Tensor, *, position: int, output: int) -> Tensor:
    log_p = _predictive(losses).logits[:, position].log_softmax(-1)[:, output]
    return -log_p * (log_p.detach() / 2).exp()


def _output_share(losses: SampleLosses, _: Tensor, *, position: int, output: int) -> Tensor:
    outputs = _predictive(losses).logits[:, position]
    return outputs[:, output] * math.sqrt(2 / outputs.shape[1])


def _binary_share(losses: SampleLosses, _: Tensor, *, position: int, output: int) -> Tensor:
    outputs = _predictive(losses).logits[:, position]
    p = outputs[:, output].detach().sigmoid()
    return outputs[:, output] * (p * (1 - p) / outputs.shape[1]).sqrt()


def _outputs(predictive: Predictive) -> tuple[int, int]:
    return predictive.logits.shape[0], predictive.logits.shape[2]


def _rows_known(losses: SampleLosses) -> Tensor:
    if losses.per_sample is None:
        raise ConfigurationError("the loss is only known as the mean of a batch: return one loss per row.")
    return losses.per_sample


def _targets_known(losses: SampleLosses) -> Tensor:
    if losses.per_target is None:
        raise ConfigurationError(f"`sample_unit`='token' needs the losses of single targets: {_UNKNOWN}")
    return losses.per_target


def _predictive(losses: SampleLosses) -> Predictive:
    if losses.predictive is None:
        raise ConfigurationError(f"labels can only be drawn where the likelihood of the loss is known: {_UNKNOWN}")
    return losses.predictive


def padded(passes: Sequence[Surrogate], count: int) -> list[Surrogate]:
    """The `passes` and dummies behind them up to `count`, which keep in step with processes that have as many."""
    return [*passes, *(_Inactive(passes[-1]) for _ in range(len(passes), count))]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Inactive:
    """A dummy backward pass: that of another surrogate, with a weight of zero for every row."""

    surrogate: Surrogate

    @property
    def weights(self) -> Tensor:
        return torch.zeros_like(self.surrogate.weights)

    @property
    def active(self) -> Tensor:
        return torch.zeros_like(self.surrogate.active)

    def __call__(self, losses: SampleLosses) -> Tensor:
        values = self.surrogate(losses)
        return torch.where(self.active, values, torch.zeros_like(values))

    def restricted(self, rows: Tensor) -> "_Inactive":
        return _Inactive(self.surrogate.restricted(rows))
