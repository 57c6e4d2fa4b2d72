"""Order: of the derivatives that a graph is built for."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


class DifferentiatesItselfError(Exception):
    """A forward pass takes derivatives inside itself: more of them are needed than the graph has."""


@final
@dataclass(slots=True)
class Order:
    """What a graph is built for.

    Attributes:
        curved: whether adjoints are to be differentiated by the layers' inputs as well, for a Hessian. A product with a
            Jacobian needs their derivative by what comes from above alone, and then the graph does not hold that.
        is_forward: whether the forward pass still runs: then no derivative is to be taken that will be differentiated.
        refused: whether one was.
    """

    curved: bool
    is_forward: bool = True
    refused: bool = False

    def check(self) -> None:
        """Raise where a derivative that is to be differentiated is taken within the forward pass."""
        if self.is_forward and torch.is_grad_enabled():
            self.refused = True
            raise DifferentiatesItselfError

    def constant(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """What an adjoint is not differentiated by, for it to be left out of the graph."""
        return tensors if self.curved else tuple(None if tensor is None else tensor.detach() for tensor in tensors)


def no_further() -> None:
    """Raise where the derivative of an adjoint is to be differentiated.

    `once_differentiable` would not: where gradients by given tensors are asked for, its error has no path to them.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a fused layer has no third derivative.")
