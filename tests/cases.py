"""Models and batches of the tests: tiny, random, in general position (no parameter at its initial 0 or 1)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import (
    CLASSES,
    TEXT,
    VOCABULARY,
    family,
    hugging_face,
)

SIZES = (3, 1, 2)  # rows of the ragged microbatches; their lengths differ too
LENGTHS = (7, 4, 6)


@dataclass(frozen=True)
class Case:
    """A model with batches for it.

    `kind` says how a row's valid targets are counted: `causal` (labels after the shift), `tokens` (labels), `row` (one),
    or `pair`, the same for `(inputs, targets)` batches under cross-entropy.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int, torch.Generator], Any]

    @property
    def loss(self) -> str | None:
        return "cross_entropy" if self.kind == "pair" else None

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return in_general_position(self.build).to(dtype)

    def microbatches(self, sizes: Sequence[int] = SIZES, *, seed: int = 0) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        lengths = LENGTHS if len(sizes) > 1 else (7,)
        return [self.batch(size, length, generator) for size, length in zip(sizes, lengths, strict=True)]


def in_general_position(build: Callable[[], nn.Module], *, seed: int = 0) -> nn.Module:
    """The model `build` makes, every parameter and running statistic moved away from 0 and 1; evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer += torch.rand_like(buffer)
    return model


def causal_batch(size: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Rows of different length, padded on the right, padding ignored by the labels."""
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(size)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def masked_batch(size: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """As `causal_batch`, with only some positions to predict."""
    batch = causal_batch(size, length, generator)
    chosen = torch.rand(size, length, generator=generator) < 0.5
    chosen[:, 0] = True
    batch["labels"] = torch.where(chosen, batch["labels"], -100)
    return batch


def seq2seq_batch(size: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    source = causal_batch(size, length + 1, generator)
    source["labels"] = causal_batch(size, length, generator)["labels"]
    return source


def classified_text_batch(size: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    batch = causal_batch(size, length, generator)
    batch["labels"] = torch.randint(CLASSES, (size,), generator=generator)
    return batch


def image_batch(size: int, _: int, generator: torch.Generator, *, side: int = 8) -> dict[str, Tensor]:
    pixels = torch.randn(size, 1, side, side, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (size,), generator=generator)}


def pair_batch(size: int, _: int, generator: torch.Generator, *, shape: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(CLASSES, (size,), generator=generator)


def quick_for(names: Iterable[str], *few: str) -> list[Any]:
    """Parameters of a test that is quick for a few of the names, which stand for the others, and slow for these."""
    return [pytest.param(name, marks=() if name in few else pytest.mark.slow) for name in names]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, CLASSES))


class ConvNet(nn.Module):
    """Torchvision-style: stem, stages of blocks, pooled head, BatchNorm throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(ResidualBlock(4), ResidualBlock(4, groups=2))
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(torch.tanh(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    def __init__(self, width: int, *, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.bn1 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.bn1(self.conv1(x)))


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, whose attention works sequence-first inside; a raw position parameter before it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, activation="gelu", batch_first=True)
        self.positions = nn.Parameter(torch.zeros(1, 4, 6))
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x + self.positions).mean(1))


class Reused(nn.Module):
    """A layer and its norm applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.norm(self.inner(x)))
        return self.head(x)


class SequenceFirst(nn.Module):
    """A layer that sees (T, N, d): with T a multiple of N its axis 0 looks like samples and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x.transpose(0, 1)))
        return self.head(hidden.mean(0))


class Scaled(nn.Module):
    """Raw parameters in every place the elementwise rules know: scalar, vector, leading ones, either operand order."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.scale = nn.Parameter(torch.ones(5))
        self.offset = nn.Parameter(torch.zeros(1, 4, 5))
        self.shift = nn.Parameter(torch.zeros(4, 1))
        self.product = nn.Parameter(torch.ones(5))
        self.norm = nn.RMSNorm(5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale * self.norm(x) + self.offset
        x = torch.tanh(self.shift + x) * self.gain
        x = x * (self.gain * self.product)
        return self.head(x.mean(1))


def _tokens(name: str, kind: str, batch: Callable[..., Any], **options: Any) -> Case:
    return Case(name, kind, lambda: family(name, **options), batch)


def _pair(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...] = (5,)) -> Case:
    return Case(name, "pair", build, lambda size, length, generator: pair_batch(size, length, generator, shape=shape))


def _classifier() -> nn.Module:
    return hugging_face("BertForSequenceClassification", "BertConfig", **TEXT, num_labels=CLASSES)


CASES = {
    case.name: case
    for case in (
        _tokens("gpt2", "causal", causal_batch),
        _tokens("llama", "causal", causal_batch),
        _tokens("qwen3", "causal", causal_batch),
        _tokens("gemma", "causal", causal_batch),
        _tokens("bert", "tokens", masked_batch),
        Case("bert_classifier", "row", _classifier, classified_text_batch),
        _tokens("t5", "tokens", seq2seq_batch),
        _tokens("opt", "causal", causal_batch, activation_function="gelu"),
        _tokens("gpt_neox", "causal", causal_batch),
        _tokens("vit", "row", image_batch),
        _tokens("resnet", "row", image_batch),
        _tokens("mixtral", "causal", causal_batch),
        _pair("mlp", mlp),
        _pair("convnet", ConvNet, (1, 6, 6)),
        _pair("encoder", Encoder, (4, 6)),
        _pair("reused", Reused),
        _pair("sequence_first", SequenceFirst, (6, 5)),
        _pair("scaled", Scaled, (4, 5)),
    )
}

# The rest of the families, for the sweep over Hugging Face: what each takes.
MORE_FAMILIES = {
    **dict.fromkeys(("qwen2", "mistral", "gemma2", "gemma3", "phi", "phi3", "mamba", "mamba2"), "causal"),
    **dict.fromkeys(("qwen3_moe", "gpt_oss", "deepseek_v3"), "causal"),
    **dict.fromkeys(("roberta", "distilbert", "deberta", "deberta_v2", "modernbert"), "tokens"),
    **dict.fromkeys(("dinov2", "clip_vision", "swin", "convnext"), "row"),
    "bart": "seq2seq",
}
