"""What the Trainer's own `compute_loss` averages over, against plain autograd of single rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from curvature_callbacks import compute_fisher_spectrum
from curvature_callbacks.processes.world import SINGLE
from curvature_callbacks.transformers.loss import loss_of_trainer
from tests.transformers.loss_cases import Passing, trainer_for
from tests.transformers_runs import VOCABULARY


def prompted(*ignored: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Rows of six tokens of which so many labels at the beginning and at the end are ignored."""
    ids = torch.randint(1, VOCABULARY, (len(ignored), 6), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row, (first, last) in zip(labels, ignored, strict=True):
        row[:first] = row[6 - last :] = -100
    return {"input_ids": ids, "labels": labels}


PROMPTS = [prompted((2, 0), (3, 1), (1, 3)), prompted((1, 0), (2, 2), (4, 0), seed=1)]
EQUAL = [prompted((2, 0), (1, 1), (2, 0)), prompted((3, 0), (1, 2), (2, 1), seed=1)]
WHOLE = [prompted((0, 0), (0, 0), (0, 0)), prompted((0, 0), (0, 0), seed=1)]


def targets(outputs: Any, labels: Tensor) -> Tensor:
    """(N, T - 1) losses of single targets, 0 where ignored."""
    return F.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:], reduction="none")


def advised(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """As the documentation of the Trainer has it."""
    losses = targets(outputs, labels).sum()
    return losses / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def needing_the_number(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    return targets(outputs, labels).sum() / num_items_in_batch


def sum_without_the_number(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return targets(outputs, labels).sum() / (num_items_in_batch or 1)


def always_sum(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return targets(outputs, labels).sum()


def of_row_means(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return (targets(outputs, labels).sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


def trained_by(directory: Path, function: Any) -> Trainer:
    if function is None:
        return trainer_for(directory, kind=Passing)
    return trainer_for(directory, arguments=lambda: {"compute_loss_func": function})


def trace_by_rows(model: Any, batches: Any, *, means: bool) -> float:
    norms = []
    for batch in batches:
        counts = (batch["labels"][:, 1:] != -100).sum(1)
        for loss, count in zip(targets(model(batch["input_ids"]), batch["labels"]).sum(1), counts, strict=True):
            gradients = torch.autograd.grad(loss / (count if means else 1), list(model.parameters()), retain_graph=True)
            norms.append(float(sum(gradient.square().sum() for gradient in gradients)))
    return sum(norms) / len(norms)


@pytest.mark.parametrize("batches", [PROMPTS, EQUAL, WHOLE], ids=["prompts", "equal counts", "whole rows"])
@pytest.mark.parametrize(
    ("function", "means"),
    [
        (None, False),
        (advised, False),
        (needing_the_number, False),
        (sum_without_the_number, False),
        (always_sum, False),
        (of_row_means, True),
    ],
    ids=["overridden", "advised", "number needed", "sum without the number", "sum", "row means"],
)
def test_samples_are_those_of_what_is_averaged_over(function: Any, means: bool, batches: Any, tmp_path: Path) -> None:
    """Where no label is ever ignored a mean over rows is one over labels, and samples have their sums over these."""
    trainer = trained_by(tmp_path, function)
    model: Any = trainer.model
    model.eval()
    found = compute_fisher_spectrum(model, batches, loss=loss_of_trainer(trainer, SINGLE), block_structure="none")
    expected = trace_by_rows(model, batches, means=means and batches is not WHOLE)
    assert found.full.metrics()["trace"] == pytest.approx(expected, rel=1e-4)
