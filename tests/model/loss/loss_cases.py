"""Batches and targets that tests of losses share."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from curvature_callbacks.model.loss.resolve import resolve_loss
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from tests.cases import CLASSES
from tests.heads import Batch, Head, text_with

LENGTH, N = 6, 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def batch_of(head: Head) -> Batch:
    return head.batch(N, LENGTH, generator())


def classes(*shape: int, count: int = CLASSES) -> Tensor:
    return torch.randint(count, shape, generator=generator())


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(), dtype=torch.float64)


def spans(start: list[int] | None = None, end: list[int] | None = None) -> Batch:
    positions = {"start_positions": torch.tensor(start or [0, 2, 5]), "end_positions": torch.tensor(end or [1, 2, 4])}
    return text_with(lambda *_: positions)(N, LENGTH, generator())


def target_loss(likelihood: str, z: Tensor, y: Tensor) -> float:
    """Of one target, written out: `z` (C,), and `y` a class or (C,)."""
    if likelihood == "categorical":
        return -math.log(math.exp(z[y]) / sum(map(math.exp, z.tolist())))
    pairs = list(zip(z.tolist(), y.tolist(), strict=True))
    if likelihood == "gaussian":
        return sum((f - t) ** 2 for f, t in pairs) / len(pairs)
    p = [(1 / (1 + math.exp(-f)), t) for f, t in pairs]
    return -sum(t * math.log(q) + (1 - t) * math.log(1 - q) for q, t in p) / len(p)


def own_losses(model: nn.Module, batch: Any) -> SampleLosses:
    return resolve_loss(None, batch)(model, batch)
