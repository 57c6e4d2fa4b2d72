"""Small monitors of small models, and what is read from their histories."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from curvature_callbacks import CurvatureMonitor
from tests.training_cases import Checksum


def example_batch(num_rows: int = 6) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, 6, generator=generator), torch.randint(3, (num_rows,), generator=generator)


def new_monitor(model: nn.Module | None = None, **changes: Any) -> CurvatureMonitor:
    usual = {"probes": [example_batch()], "loss": "cross_entropy", "measure": [Checksum()], "when": 1}
    return CurvatureMonitor(nn.Linear(6, 3) if model is None else model, **(usual | changes))


def row_losses(model: nn.Module, rows: Any) -> torch.Tensor:
    """All that is known of this loss is its value."""
    return F.cross_entropy(model(rows[0]), rows[1], reduction="none")


def outcomes(watching: CurvatureMonitor, name: str) -> list[tuple[int, str | None]]:
    return [(record.step, record.error) for record in watching.history if record.measurement == name]
