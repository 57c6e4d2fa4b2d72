"""Tiny models around one operation, and the two things asked of its rule: the oracle's Gram, and nothing row by row."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.model.blocks import group_blocks
from tests.cases import CLASSES, LENGTHS, SIZES, in_general_position
from tests.reference import sample_gradients

T = -1  # in a shape: positions, whose number differs from microbatch to microbatch
Parts = dict[str, nn.Module | nn.Parameter]


class Tiny(nn.Module):
    """`body(self, x)` under a fixed read-out; with a stem its input is an activation, without one a constant."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], parts: Parts, *, stem: bool) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.ones(())) if stem else None
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        if self.stem is not None:
            x = torch.tanh(x * self.stem)
        return read_out(self.body(self, x))


def read_out(hidden: Tensor) -> Tensor:
    """(N, CLASSES) logits that weigh every entry of `hidden` (N, ...) differently."""
    flat = torch.tanh(hidden.flatten(1))
    weights = torch.sin(1.0 + 2.0 * torch.arange(flat.shape[1] * CLASSES, dtype=flat.dtype))
    return flat @ weights.reshape(-1, CLASSES)


@dataclass(frozen=True, kw_only=True)
class RuleCase:
    """One operation.

    Attributes:
        body: what the model does.
        parts: makes its parameters and modules.
        shape: of one row; `T` is 7, 4 or 6.
        vocabulary: the rows hold integers below it; None for numbers.
        by_row: parameters that may go row by row (`...`: all).
        dead: parameters without any gradient (`...`: whichever).
    """

    body: Callable[[Any, Tensor], Tensor]
    parts: Callable[[], Parts]
    shape: tuple[int, ...] = (T, 4)
    vocabulary: int | None = None
    by_row: Collection[str] | Any = ()
    dead: Collection[str] | Any = ()

    def model(self, *, stem: bool = False) -> nn.Module:
        return in_general_position(lambda: Tiny(self.body, self.parts(), stem=stem)).double()

    def microbatches(self, sizes: tuple[int, ...] = SIZES) -> list[tuple[Tensor, Tensor]]:
        lengths = [LENGTHS[i % len(LENGTHS)] for i in range(len(sizes))]
        return [self._batch(size, length, seed) for seed, (size, length) in enumerate(zip(sizes, lengths, strict=True))]

    def _batch(self, size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (size, *(length if extent == T else extent for extent in self.shape))
        if self.vocabulary is None:
            inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            inputs = torch.randint(self.vocabulary, shape, generator=generator)
        return inputs, torch.randint(CLASSES, (size,), generator=generator)

    def assert_exact(self, *, stem: bool = False, sizes: tuple[int, ...] = SIZES) -> None:
        """Every parameter's Gram is the oracle's, and none but those allowed went row by row."""
        assert_ruled(self.model(stem=stem), self.microbatches(sizes), by_row=self.by_row, dead=self.dead)


def weight(*shape: int) -> nn.Parameter:
    """Entries of size about 1/2, so that nothing saturates."""
    return nn.Parameter(torch.randn(shape) / 2)


def assert_ruled(
    model: nn.Module,
    microbatches: list[Any],
    *,
    loss: Any = "cross_entropy",
    truth: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-10,
    by_row: Collection[str] | Any = (),
    dead: Collection[str] | Any = (),
) -> None:
    found = parameter_grams(model, microbatches, loss)
    truth = sample_gradients(model, microbatches, "pair") if truth is None else truth
    without = {name for name, G in truth.items() if not G.any()}
    assert dead is ... or without == set(dead), f"a case that tests nothing there: {without}"
    assert_exact(found, truth, model, tolerance)
    assert_no_fallback(found, by_row)


def parameter_grams(model: nn.Module, microbatches: list[Any], loss: Any = "cross_entropy") -> BlockGrams:
    with offline_problem(model, microbatches, loss=loss, params_filter=None, block_structure="parameter") as problem:
        return problem.grams()


def assert_exact(found: BlockGrams, truth: Mapping[str, Tensor], model: nn.Module, tolerance: float) -> None:
    blocks = {name: block for block, (name,) in group_blocks(model, list(truth), "parameter").items()}
    floor = 1e-8 * sum(G.square().sum().item() for G in truth.values())  # key biases: rounding in both
    errors = {}
    for name, G in truth.items():
        K = torch.tensor([[float(a @ b) for b in G] for a in G], dtype=torch.float64)
        errors[name] = (found.grams[blocks[name]].cpu() - K).abs().max().item() / max(K.abs().max().item(), floor)
    wrong = {name: f"{error:.0e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors {wrong}, with {dict(found.fallback)} row by row"


def assert_no_fallback(found: BlockGrams, by_row: Collection[str] | Any = ()) -> None:
    unexpected = {name: why for name, why in found.fallback.items() if by_row is not ... and name not in by_row}
    assert not unexpected, f"row by row {unexpected}"
