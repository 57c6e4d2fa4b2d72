"""What the tests of all operators share: the dense matrix, and a model that the loss uses in part."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.linalg.operator import Operator
from tests.cases import CLASSES


def dense(operator: Operator) -> Tensor:
    """(P, P) by products with unit vectors."""
    return operator.matmat(torch.eye(operator.shape[0], dtype=operator.dtype))


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
