"""Inactive passes: those that a process makes only because others have more surrogates than it has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.model.sample_losses import SampleLosses
from curvature_callbacks.model.surrogates import Surrogate


def padded(found: Sequence[Surrogate], count: int) -> list[Surrogate]:
    """`count` passes, the last ones without active rows: where others have as many, and all must take part in every one."""
    return [*found, *(_Inactive(found[-1]) for _ in range(len(found), count))]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Inactive:
    """The pass of another surrogate without its pseudo-samples."""

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

    def rows(self, rows: Tensor) -> "_Inactive":
        return _Inactive(self.surrogate.rows(rows))
