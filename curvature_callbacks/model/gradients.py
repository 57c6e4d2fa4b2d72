"""Gradients of a loss by name."""

from collections.abc import Mapping

import torch
from torch import Tensor


def gradients(loss: Tensor, leaves: Mapping[str, Tensor], *, again: bool = False) -> dict[str, Tensor]:
    """Name to the gradient of `loss`; zero where it does not depend on the leaf. Cost: one backward pass.

    Args:
        loss: 0-d.
        leaves: what to differentiate by.
        again: whether to keep its graph for another backward pass.
    """
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    values = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True, retain_graph=again)
    return dict(zip(leaves, values, strict=True))
