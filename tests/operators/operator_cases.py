"""What the tests of all operators share: the dense matrix, models that the loss uses in part, kernels without a derivative."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.linalg.operator import Operator
from tests.cases import CLASSES, in_general_position


def dense(operator: Operator) -> Tensor:
    """(P, P) by products with unit vectors."""
    return operator.matmat(torch.eye(operator.shape[0], dtype=operator.dtype))


def vectors(operator: Operator, count: int = 4) -> Tensor:
    """(P, count) at random, which see every entry of a matrix at less than its P products."""
    return torch.randn(operator.shape[0], count, generator=torch.Generator().manual_seed(0), dtype=operator.dtype)


def names_of(model: nn.Module, prefixes: tuple[str, ...]) -> list[str]:
    """Of the parameters that begin with one of these prefixes."""
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def mean_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """A callable that tells nothing but the mean over the rows."""
    return F.cross_entropy(model(batch[0]), batch[1])


def row_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """A callable that tells one loss per row."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class PartlyUsed(nn.Module):
    """`unused` is not in the loss, `linear` enters it linearly: its gradient does not depend on it, its Fisher is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.curved = nn.Linear(5, CLASSES)
        self.linear = nn.Parameter(torch.ones(2))


def partial_loss(model: nn.Module, batch: Any) -> Tensor:
    losses = F.cross_entropy(model.curved(batch[0]), batch[1], reduction="none")
    return losses + model.linear.sum() * batch[0][:, 0]


class OnceTanh(torch.autograd.Function):
    """What a fused kernel looks like to autograd: a backward pass without a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Fused(nn.Module):
    """Two layers with the kernel before (`first`), between (`inside`) or after (`last`) them, or without one (`none`)."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4)
        self.b = nn.Linear(4, CLASSES)
        self._place = place

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(OnceTanh.apply(x) if self._place == "first" else x)
        logits = self.b(OnceTanh.apply(hidden) if self._place == "inside" else torch.tanh(hidden))
        return OnceTanh.apply(logits) if self._place == "last" else logits


def with_fused_kernel(place: str) -> nn.Module:
    """In float64; the same parameters wherever the kernel is."""
    return in_general_position(lambda: Fused(place)).double()
