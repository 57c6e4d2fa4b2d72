"""Types of Fisher and a language model of few parameters that their tests share."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import FisherSpectra
from tests.cases import CASES, VOCABULARY, in_general_position
from tests.reference import relative_error

TYPES = [(fisher, unit) for fisher in ("empirical", "sampled", "exact") for unit in ("sequence", "token")]
WITHOUT_DRAWS = [(fisher, unit) for fisher, unit in TYPES if fisher != "sampled"]
ALL = 1000  # targets a row: every one of them


def valid_positions(row: Mapping[str, Tensor]) -> list[int]:
    return [t for t in range(row["labels"].shape[1] - 1) if row["labels"][0, t + 1] != -100]


class Speller(nn.Module):
    """A language model of two parameters, cheap enough for many seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.table(input_ids).cumsum(1)))
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits=logits)


def spelled(size: int = 3) -> tuple[nn.Module, dict[str, Tensor]]:
    batch = CASES["gpt2"].microbatches((size,))[0]
    return in_general_position(Speller).double(), {
        **batch,
        "labels": torch.where(batch["labels"] == -100, -100, batch["labels"] % 4),
    }


def padded(batch: Mapping[str, Tensor], extra: int) -> dict[str, Tensor]:
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: F.pad(values, (0, extra), value=fill[name]) for name, values in batch.items()}


def assert_same(found: FisherSpectra, expected: FisherSpectra):
    assert relative_error(found.full.eigenvalues, expected.full.eigenvalues) < 1e-6
    assert found.full.rank == expected.full.rank
    metrics = expected.full.metrics()
    assert found.full.metrics() == pytest.approx(metrics, rel=1e-4, abs=1e-9 * metrics["trace"])
    for block, spectrum in expected.blocks.items():
        assert relative_error(found.blocks[block].eigenvalues, spectrum.eigenvalues) < 1e-6, block


def sample_losses(model: nn.Module, batch: Any) -> Tensor:
    """A loss of unknown targets: only (N,) values."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
