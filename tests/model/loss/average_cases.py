"""Models whose loss averages in every way there is, and what single rows of theirs then have for a loss."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import in_general_position

CLASSES = 7
Rows = Callable[[Tensor, Tensor], Tensor]  # of the losses of single targets, 0 where ignored, and which of them count


def row_means(losses: Tensor, valid: Tensor) -> Tensor:
    """(N,) a mean over each row's targets, 0 for a row without any."""
    return losses.sum(1) / valid.sum(1).clamp_min(1)


# How a loss comes from those of its targets (N, T), and what it has for single rows: what a mean is taken of.
AVERAGES: dict[str, tuple[Rows, Rows]] = {
    "over labels": (lambda losses, valid: losses.sum() / valid.sum(), lambda losses, valid: losses.sum(1)),
    "over rows": (lambda losses, valid: row_means(losses, valid).mean(), row_means),
    "over rows with a label": (lambda losses, valid: row_means(losses, valid).sum() / valid.any(1).sum(), row_means),
    "over rows, of sums": (lambda losses, valid: losses.sum(1).mean(), lambda losses, valid: losses.sum(1)),
    "sum": (lambda losses, valid: losses.sum(), lambda losses, valid: losses.sum(1)),
}


class Speaker(nn.Module):
    """A language model whose name tells nothing, or the wrong thing."""

    def __init__(self, average: str, *, shift: bool, own_logits: bool = True) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(CLASSES, 3), nn.Linear(3, CLASSES)
        self.average, self.shift, self.own_logits, self.num_calls = average, shift, own_logits, 0

    def targets(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the losses of single targets (N, T), and which of them count."""
        logits = self.head(self.table(input_ids).cumsum(1).tanh())
        at, then = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return logits, F.cross_entropy(at.mT, then, reduction="none"), then != -100

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        self.num_calls += 1
        logits, losses, valid = self.targets(input_ids, labels)
        return SimpleNamespace(loss=AVERAGES[self.average][0](losses, valid), logits=logits if self.own_logits else logits + 0)


class SpeakerForCausalLM(Speaker):
    """Its name says that it shifts."""


def speaker(average: str = "over labels", *, causal: bool = False, **options: Any) -> Speaker:
    kind = SpeakerForCausalLM if causal else Speaker
    model = in_general_position(lambda: kind(average, **({"shift": causal} | options))).double()
    assert isinstance(model, Speaker)
    return model


def flattened(model: Speaker, scale: float) -> Speaker:
    """The same with logits so small that all targets have nearly the loss log(classes)."""
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(scale)
    return model


def labelled(*ignored: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Rows of six tokens, of which so many labels at the beginning and at the end are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(CLASSES, (len(ignored), 6), generator=generator)
    labels = torch.randint(CLASSES, (len(ignored), 6), generator=generator)
    for row, (first, last) in zip(labels, ignored, strict=True):
        row[:first] = row[6 - last :] = -100
    return {"input_ids": ids, "labels": labels}


def row_losses(model: Speaker, batch: dict[str, Tensor]) -> Tensor:
    """(N,) from the definition."""
    _, losses, valid = model.targets(**batch)
    return AVERAGES[model.average][1](losses, valid)


def fisher_trace(model: Speaker, *batches: dict[str, Tensor]) -> float:
    """Mean squared gradient norm of single rows, by plain autograd; those without a label do not count."""
    norms = []
    for batch in batches:
        for loss, labels in zip(row_losses(model, batch), batch["labels"], strict=True):
            if (labels[1:] if model.shift else labels).ne(-100).any():
                gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                norms.append(float(sum(gradient.square().sum() for gradient in gradients)))
    return sum(norms) / len(norms)
