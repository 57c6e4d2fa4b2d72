"""A loss and its gradient at one microbatch, by whatever route, and how far two routes are apart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from curvature_callbacks.isolation.model import seeded
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.objective import Objective

TOLERANCE: Final = 1e-4  # relative; two ways through a float32 network differed by 1e-7 to 1e-5
_ROUNDING: Final = 1e-6  # a difference of mean losses, and a norm of gradients, that may be rounding alone


@final
@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """A mean loss over one microbatch and its gradient.

    Attributes:
        value: `sum_i l_i / sum_i n_i`.
        size: the mean of `|l_i|` a target where single rows are known, else `|value|`.
        gradients: name to gradient; None where the loss does not depend on the parameter.
    """

    value: float
    size: float
    gradients: Mapping[str, Tensor | None]


@final
@dataclass(frozen=True, slots=True)
class Difference:
    """How far an evaluation is from another one.

    Attributes:
        value: of the values, relative to the mean of `|l_i|`.
        gradient: norm of the difference of the gradients, relative to the larger one.
        factor: c where the gradient is c times the other, within the tolerance, and c is not 1; else None.
        missing: parameters that only the other one has a gradient for.
        worst: the parameter whose gradients differ most.
    """

    value: float
    gradient: float
    factor: float | None
    missing: tuple[str, ...]
    worst: str

    @property
    def is_finite(self) -> bool:
        """Whether both could be compared: neither has a value or a gradient that is not finite."""
        return math.isfinite(self.value) and math.isfinite(self.gradient)

    def exceeds(self, tolerance: float, of_gradient: float | None = None) -> bool:
        """Whether values differ by more than `tolerance`, or gradients by more than that or a tolerance of their own."""
        return self.value > tolerance or self.gradient > (tolerance if of_gradient is None else of_gradient)


def evaluated_objective(objective: Objective, batch: Any, leaves: Mapping[str, Tensor], seed: int) -> Evaluation:
    """Value and gradient of an objective at a microbatch, its draws from `seed`. Cost: one gradient."""
    with torch.enable_grad(), objective.saving(), seeded(objective.modules[0], seed=seed):
        losses = objective(batch, leaves)
    return differentiated(losses, leaves)


def differentiated(losses: SampleLosses, leaves: Mapping[str, Tensor]) -> Evaluation:
    """Value and gradient of the mean loss. Cost: one backward pass."""
    count = int(losses.num_targets.sum())
    mean = losses.total / count
    values: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if mean.requires_grad:
        values = torch.autograd.grad(mean, list(leaves.values()), allow_unused=True)
    value = float(mean.detach())
    size = abs(value) if losses.per_sample is None else float(losses.per_sample.detach().abs().sum() / count)
    return Evaluation(value, size, dict(zip(leaves, values, strict=True)))


def difference(one: Evaluation, other: Evaluation) -> Difference:
    """How far `one` is from the `other`, of the same parameters.

    A difference of values below 1e-6, and gradients whose norms both are, tell nothing: they count as equal.
    """
    apart = abs(one.value - other.value)
    value = 0.0 if apart <= _ROUNDING else apart / max(one.size, other.size, abs(one.value), abs(other.value))
    products = {name: _gradient_products(one.gradients[name], other.gradients[name]) for name in one.gradients}
    total = [sum(column) for column in zip(*products.values(), strict=True)]
    squared, of_one, of_other, mixed = total or [0.0] * 4
    largest = math.sqrt(max(of_one, of_other))
    return Difference(
        value=value,
        gradient=0.0 if largest <= _ROUNDING else math.sqrt(squared) / largest,
        factor=_factor(of_one, of_other, mixed),
        missing=tuple(name for name, (_, own, others, _) in products.items() if own == 0 < others),
        worst=max(products, key=lambda name: products[name][0], default=""),
    )


def _gradient_products(one: Tensor | None, other: Tensor | None) -> list[float]:
    """`||a - b||^2`, `||a||^2`, `||b||^2` and `a'b`; None is zero."""
    if one is None and other is None:
        return [0.0] * 4
    a, b = (torch.zeros_like(present) if given is None else given for given, present in ((one, other), (other, one)))  # type: ignore[arg-type]
    a, b = a.to(torch.promote_types(a.dtype, torch.float32)), b.to(torch.promote_types(b.dtype, torch.float32))
    pairs = ((a - b, a - b), (a, a), (b, b), (a, b))
    sums: list[float] = torch.stack([(x * y).sum(dtype=torch.float64) for x, y in pairs]).tolist()
    return sums


def _factor(of_one: float, of_other: float, mixed: float) -> float | None:
    """c where `a = c b` and c is not 1, from `||a||^2`, `||b||^2` and `a'b`."""
    if not of_one or not of_other:
        return None
    c = mixed / of_other
    is_multiple = of_one - c * mixed <= TOLERANCE**2 * of_one
    return c if is_multiple and abs(c - 1) > TOLERANCE else None
