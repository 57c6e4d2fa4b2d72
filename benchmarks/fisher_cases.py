"""Models, batches and limits of the Fisher benchmark: small, seeded, no weights or data from anywhere."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, final

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvature_callbacks.batches import map_tensors
from curvature_callbacks.microbatch import as_microbatch

Family = Literal["transformer", "perceptron", "convolution"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """A model in training mode (without dropout, so that evaluation mode computes the same) and the rows of one probe.

    Attributes:
        model: the model.
        batch: what a callback draws: a mapping with labels, or `(inputs, targets)`.
        targets_per_row: valid targets of every row; the summed loss of a row is its mean loss times this.
    """

    model: nn.Module
    batch: Any
    targets_per_row: int = 1

    @property
    def loss(self) -> Literal["cross_entropy"] | None:
        """The `loss` argument of `Problem` for this batch."""
        return None if isinstance(self.batch, Mapping) else "cross_entropy"

    @property
    def num_samples(self) -> int:
        return as_microbatch(self.batch).num_rows

    def mean_loss(self, batch: Any, values: Mapping[str, Tensor] | None = None, model: nn.Module | None = None) -> Tensor:
        """The loss training minimises, 0-d, at other parameter values or of a copy of the model if given."""
        called = self.model if model is None else model
        if isinstance(batch, Mapping):
            output = called(**batch) if values is None else functional_call(called, dict(values), (), dict(batch))
            return output.loss
        logits = called(batch[0]) if values is None else functional_call(called, dict(values), (batch[0],))
        return F.cross_entropy(logits, batch[1])

    def summed_loss(self, batch: Any, values: Mapping[str, Tensor] | None = None, model: nn.Module | None = None) -> Tensor:
        """`sum_i l_i`, whose gradients are those of the Gram."""
        return self.mean_loss(batch, values, model) * (as_microbatch(batch).num_rows * self.targets_per_row)

    def microbatches(self, size: int) -> list[Any]:
        return [as_microbatch(self.batch).take(rows).content for rows in torch.arange(self.num_samples).split(size)]

    def to(self, dtype: torch.dtype, rows: Tensor) -> "Workload":
        """An independent copy with some of the rows, in another dtype."""
        batch = map_tensors(as_microbatch(self.batch).take(rows).content, lambda x: x.to(dtype) if x.is_floating_point() else x)
        return Workload(copy.deepcopy(self.model).to(dtype), batch, self.targets_per_row)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table.

    Attributes:
        build: makes the workload on a device; seeded by the caller.
        N: samples.
        T: positions per sample.
        family: decides the limit.
        smooth: whether the activation is smooth: a kink's sign may differ between float32 and float64, in every method.
        timed: whether time and memory are measured, or accuracy alone.
        accuracy_limit: largest relative error accepted; meant for smooth models.
        oracle_rows: rows of the Gram that are compared with the float64 loop.
    """

    build: Callable[[torch.device], Workload]
    N: int
    T: int = 1
    family: Family
    smooth: bool = True
    timed: bool = True
    accuracy_limit: float = 1e-6
    oracle_rows: int = 16

    @property
    def limit(self) -> float:
        """Largest time in plain passes that is accepted."""
        return {"transformer": 1.10 + self.N / (3 * self.T), "perceptron": 1.10, "convolution": 1.6}[self.family]

    @property
    def aim(self) -> float:
        """What is aimed at: the use of the Gram's symmetry leaves `N / (6 T)`. None is stated for convolutions."""
        return {"transformer": 1.05 + self.N / (6 * self.T), "perceptron": 1.10, "convolution": 1.6}[self.family]


def cases() -> dict[str, Case]:
    """The full table."""
    table: dict[str, Case] = {}
    for N in (8, 32, 64):
        for tied in (True, False):
            table[f"gpt2_{'tied' if tied else 'untied'}_n{N}"] = gpt2_case(N=N, T=128, tied=tied)
    return table | {
        "gpt2_overhead_bound": gpt2_case(N=64, T=16, layers=12, width=32, vocabulary=256),
        "vit_n64": vit_case(N=64, width=192, layers=6),
        "mlp_3x512_n256": mlp_case(N=256, widths=(784, 512, 512, 512, 10)),
        "resnet18_w16_n64": resnet_case(N=64, width=16, activation=nn.ReLU),
        "resnet18_w16_n64_smooth": resnet_case(N=64, width=16, activation=nn.SiLU, timed=False),
        "mlp_1e7_parameters": mlp_case(N=32, widths=(784, 8192, 448, 10), timed=False),
        "positionwise_1e7_parameters": positionwise_case(N=8, T=128, width=512, hidden=10240),
    }


def quick_cases() -> dict[str, Case]:
    """The same kinds at sizes where a pass takes milliseconds: shows that everything runs, times mean nothing."""
    small = {"layers": 2, "width": 32, "vocabulary": 64}
    return {
        "gpt2_tied_quick": gpt2_case(N=4, T=16, tied=True, **small),
        "gpt2_untied_quick": gpt2_case(N=4, T=16, tied=False, **small),
        "vit_quick": vit_case(N=4, width=24, layers=2),
        "mlp_quick": mlp_case(N=8, widths=(16, 32, 10)),
        "resnet_quick": resnet_case(N=4, width=4, activation=nn.SiLU),
        "positionwise_quick": positionwise_case(N=4, T=16, width=16, hidden=64),
    }


def gpt2_case(*, N: int, T: int, layers: int = 4, width: int = 256, vocabulary: int = 5000, tied: bool = True) -> Case:
    def build(device: torch.device) -> Workload:
        return gpt2(device, N=N, T=T, layers=layers, width=width, vocabulary=vocabulary, tied=tied)

    return Case(build=build, N=N, T=T, family="transformer")


def gpt2(device: torch.device, *, N: int, T: int, layers: int, width: int, vocabulary: int, tied: bool = True) -> Workload:
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_positions=T,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,  # as the Trainer sets it
        tie_word_embeddings=tied,
    )
    model = transformers.GPT2LMHeadModel(config).to(device).train()
    ids = torch.randint(vocabulary, (N, T), device=device)
    return Workload(model, {"input_ids": ids, "labels": ids}, T - 1)


def vit_case(*, N: int, width: int, layers: int) -> Case:
    def build(device: torch.device) -> Workload:
        config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=3,
            intermediate_size=4 * width,
            image_size=32,
            patch_size=4,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = transformers.ViTForImageClassification(config).to(device).train()
        images = torch.randn(N, 3, 32, 32, device=device)
        return Workload(model, {"pixel_values": images, "labels": torch.randint(10, (N,), device=device)})

    return Case(build=build, N=N, T=65, family="transformer")  # 8 x 8 patches and the class token


def mlp_case(*, N: int, widths: tuple[int, ...], timed: bool = True) -> Case:
    def build(device: torch.device) -> Workload:
        layers: list[nn.Module] = []
        for columns, rows in pairwise(widths):
            layers += [nn.Linear(columns, rows), nn.Tanh()]
        batch = (torch.randn(N, widths[0], device=device), torch.randint(widths[-1], (N,), device=device))
        return Workload(nn.Sequential(*layers[:-1]).to(device), batch)

    large = max(rows * columns for columns, rows in pairwise(widths)) > 5e6
    return Case(
        build=build,
        N=N,
        family="perceptron",
        timed=timed,
        accuracy_limit=5e-6 if large else 1e-6,
        oracle_rows=8 if large else 64,
    )


def positionwise_case(*, N: int, T: int, width: int, hidden: int) -> Case:
    """A wide feed-forward part over positions, where per-sample gradients are materialised rather than factored."""

    def build(device: torch.device) -> Workload:
        batch = (torch.randn(N, T, width, device=device), torch.randint(10, (N,), device=device))
        return Workload(_Positionwise(width, hidden).to(device), batch)

    return Case(build=build, N=N, T=T, family="transformer", timed=False, accuracy_limit=5e-6, oracle_rows=8)


def resnet_case(*, N: int, width: int, activation: type[nn.Module], timed: bool = True) -> Case:
    def build(device: torch.device) -> Workload:
        batch = (torch.randn(N, 3, 32, 32, device=device), torch.randint(10, (N,), device=device))
        return Workload(_ResNet(width, activation).to(device), batch)

    return Case(build=build, N=N, T=1024, family="convolution", smooth=activation is not nn.ReLU, timed=timed)


class _Positionwise(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(inputs))).mean(1))


class _ResNet(nn.Module):
    """ResNet-18: four stages of two basic blocks, with GroupNorm and the 3 x 3 stem of 32 x 32 images."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, width)
        self.act = activation()
        for stage in range(4):
            columns, rows = width * 2 ** max(stage - 1, 0), width * 2**stage
            first = _BasicBlock(columns, rows, 1 if stage == 0 else 2, activation)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, _BasicBlock(rows, rows, 1, activation)))
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.act(self.norm1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
        return self.fc(features.mean((2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, columns: int, rows: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(columns, rows, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, rows)
        self.conv2 = nn.Conv2d(rows, rows, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, rows)
        self.act1, self.act2 = activation(), activation()
        changes = stride != 1 or columns != rows
        self.downsample = (
            nn.Sequential(nn.Conv2d(columns, rows, 1, stride=stride, bias=False), nn.GroupNorm(4, rows)) if changes else None
        )

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.act1(self.norm1(self.conv1(inputs)))
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        return self.act2(self.norm2(self.conv2(features)) + shortcut)
