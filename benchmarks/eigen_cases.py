"""Trained models and probe batches of the eigenpair benchmark: an untrained model has neither outliers nor a negative end.

Shapes are those of the Fisher benchmark. Images are scikit-learn's digits, enlarged; text is the documentation that comes with
Python, as words and punctuation marks. A few dozen seeded Adam steps, then a probe batch that training did not see.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import isqrt
from pydoc_data.topics import topics
from typing import Any, Literal, final

import torch
from fisher_cases import Case, Family, Workload, cases, gpt2, gpt2_case, mlp_case, resnet_case, vit_case
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

Draw = Callable[[int, int], Any]  # (samples, seed) -> batch


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One model of the table.

    Attributes:
        case: shape of model and batch.
        data: what it is trained on.
        steps: Adam steps before it is measured.
        rate: their learning rate.
        jobs: whether whole jobs are measured on it, or products alone.
    """

    case: Case
    data: Literal["text", "digits"]
    steps: int
    rate: float = 1e-3
    jobs: bool = True

    @property
    def family(self) -> Family:
        return self.case.family

    def build(self, device: torch.device, *, weights: dict[str, Tensor] | None = None) -> Workload:
        """The model, trained here or with `weights` of an earlier training, and a batch it was not trained on."""
        torch.manual_seed(0)
        workload = self.case.build(device)
        draw = self.draw(workload)
        if weights is None:
            train(workload, draw, steps=self.steps, rate=self.rate)
        else:
            workload.model.load_state_dict(weights)
        return Workload(workload.model, draw(self.case.N, -1), workload.targets_per_row)

    def draw(self, workload: Workload) -> Draw:
        """Where batches of this model come from."""
        if self.data == "text":
            return text_batches(workload.batch["input_ids"], workload.model.config.vocab_size)
        return digit_batches(workload.batch)


def train(workload: Workload, draw: Draw, *, steps: int, rate: float, first: int = 0) -> None:
    """Adam, a new seeded batch every step."""
    optimizer = torch.optim.Adam(workload.model.parameters(), lr=rate)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        workload.mean_loss(draw(workload.num_samples, step)).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    workload.model.requires_grad_(True)


def text_batches(like: Tensor, vocabulary: int) -> Draw:
    """Random windows of `like`'s (N, T) length."""
    tokens, T = _tokens(vocabulary), like.shape[1]

    def draw(num: int, seed: int) -> dict[str, Tensor]:
        starts = torch.randint(len(tokens) - T, (num,), generator=_generator(seed))
        ids = torch.stack([tokens[start : start + T] for start in starts]).to(like.device)
        return {"input_ids": ids, "labels": ids}

    return draw


def digit_batches(like: Any) -> Draw:
    """Random digits in the form of a batch: a mapping for Hugging Face, rows of pixels or images in a tuple otherwise."""
    inputs, targets = like.values() if isinstance(like, dict) else like
    shape = inputs.shape[1:]  # (pixels,) or (channels, height, width)
    pixels, labels = _digits(shape[-1] if len(shape) > 1 else isqrt(shape[0]))

    def draw(num: int, seed: int) -> Any:
        rows = torch.randint(len(labels), (num,), generator=_generator(seed))
        images = pixels[rows].flatten(1) if len(shape) == 1 else pixels[rows, None].expand(-1, *shape)
        found = images.contiguous().to(inputs.device), labels[rows].to(targets.device)
        return dict(zip(like, found, strict=True)) if isinstance(like, dict) else found

    return draw


def table(*, quick: bool) -> dict[str, Trained]:
    """Every model of the benchmark."""
    if quick:
        text = gpt2_case(N=4, T=16, layers=2, width=32, vocabulary=64)
        return {
            "gpt2_quick": Trained(case=text, data="text", steps=10, jobs=False),
            "vit_quick": Trained(case=vit_case(N=4, width=24, layers=2), data="digits", steps=5, jobs=False),
            "mlp_quick": Trained(case=mlp_case(N=16, widths=(64, 32, 10)), data="digits", steps=10),
            "resnet_quick": Trained(case=resnet_case(N=4, width=4, activation=nn.SiLU), data="digits", steps=2, jobs=False),
        }
    shapes = cases()
    return {
        "gpt2_4m": Trained(case=shapes["gpt2_tied_n8"], data="text", steps=60),
        "gpt2_660k": Trained(case=small_gpt2(), data="text", steps=100),
        "vit": Trained(case=shapes["vit_n64"], data="digits", steps=40, rate=2e-4),
        "mlp_3x512": Trained(case=shapes["mlp_3x512_n256"], data="digits", steps=30, rate=3e-4),
        "resnet18_w16": Trained(case=shapes["resnet18_w16_n64"], data="digits", steps=20, jobs=False),
    }


def small_gpt2() -> Case:
    """660 k parameters: small enough for many runs of the solver."""

    def build(device: torch.device) -> Workload:
        return gpt2(device, N=8, T=64, layers=3, width=128, vocabulary=512)

    return Case(build=build, N=8, T=64, family="transformer")


def weights_of(workload: Workload) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in workload.model.state_dict().items()}


@cache
def _tokens(vocabulary: int) -> Tensor:
    """Words by frequency; the rarest share the last number."""
    words = re.findall(r"\w+|[^\w\s]", "\n".join(topics[name] for name in sorted(topics)))
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    return torch.tensor([ranks.get(word, vocabulary - 1) for word in words])


@cache
def _digits(size: int) -> tuple[Tensor, Tensor]:
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8)
    return F.interpolate(pixels, size=(size, size), mode="bilinear")[:, 0], torch.tensor(found.target)


def _generator(seed: int) -> torch.Generator:
    """Probe batches count down from -1, training batches up from 0."""
    return torch.Generator().manual_seed(seed % 2**31)
