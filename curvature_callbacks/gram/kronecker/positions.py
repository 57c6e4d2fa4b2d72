"""Positions: a layer's inputs and output gradients, some samples of a microbatch at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, Protocol, final, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvature_callbacks.gram.uses.uses import Use
from curvature_callbacks.linalg.accumulate import gram
from curvature_callbacks.linalg.kronecker import Factor, factor_of_matrix, factor_of_vectors
from curvature_callbacks.model.loss.sharing import Sharing

Extract = Callable[[Use], tuple[Tensor, Tensor]]

CHUNK_BYTES: Final = 64 << 20  # of copied positions, or of per-sample gradients, at a time


@runtime_checkable
class HasLayerVectors(Protocol):
    """A use of a layer's weight whose per-sample gradient is `sum_t b_t a_t'` (d_out, d_in)."""

    def layer_vectors(self) -> tuple[Tensor, Tensor]:
        """`(inputs a (N, T, d_in), output gradients b (N, T, d_out))`."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicrobatchUses:
    """What the backward passes over one microbatch did with one weight.

    Attributes:
        passes: for each backward pass the completed uses of the weight, in one order for all passes; a pass that did not
            reach the weight has none.
        counts: (N,) pseudo-samples each row stands for: 1 (also for the exact Fisher, whose passes are positions and classes),
            times the number of label draws, times n_i for the token unit. 0 leaves the row out (no valid target).
            The sum over all microbatches is the Fisher's normaliser.
    """

    passes: Sequence[Sequence[Use]]
    counts: Tensor


def normaliser_of(microbatches: Sequence[MicrobatchUses]) -> float:
    """Z of the Fisher `(1/Z) sum_s g_s g_s'`: the pseudo-samples of all rows."""
    return sum(batch.counts.sum().item() for batch in microbatches)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Some rows of one microbatch.

    Attributes:
        inputs: (n, T, d_in).
        outputs: for each pass (n, T, d_out).
        live: (n, T) bool, whether a position has an output gradient in any pass.
        counts: (n,) float64.
    """

    inputs: Tensor
    outputs: list[Tensor]
    live: Tensor
    counts: Tensor

    def num_live(self) -> Tensor:
        """(n,) float64, T_i: positions of each row that have an output gradient."""
        return self.live.sum(1, dtype=torch.float64)

    def weighted_inputs(self, sharing: Sharing) -> Tensor:
        """Vectors (m, d_in) whose second moment is `sum_i c_i sum_t a_it a_it'` or `sum_i c_i a_i a_i'`."""
        weights = self.live * self.counts[:, None].sqrt()  # (n, T)
        if sharing == "expand":
            return (self.inputs * weights[..., None].to(self.inputs.dtype)).flatten(0, 1)
        means = weights / self.num_live().clamp_min(1.0)[:, None]
        return (self.inputs * means[..., None].to(self.inputs.dtype)).sum(1)

    def gradients(self, sharing: Sharing) -> Tensor:
        """Vectors (m, d_out) whose second moment is that of the output gradients, by position or summed over positions."""
        return torch.cat([b.flatten(0, 1) if sharing == "expand" else b.sum(1) for b in self.outputs])

    def mass(self, sharing: Sharing) -> float:
        """What the second moment of the gradients is divided by: `sum_i c_i T_i`, or `sum c_i` over rows with a position."""
        live = self.num_live() if sharing == "expand" else self.live.any(1)
        return (self.counts * live).sum().item()


def pieces(
    microbatches: Sequence[MicrobatchUses], extract: Extract, *, bias: bool, device: torch.device, chunk_bytes: int
) -> Iterator[Positions]:
    """Rows with a count, copied to `device` in pieces of at most `chunk_bytes` (or one row).

    Args:
        microbatches: what to go through.
        extract: `(inputs (N, T, d_in), output gradients (N, T, d_out))` of a use; several uses in a pass are put side by side.
        bias: whether to append the constant 1 to the inputs.
        device: where to put them.
        chunk_bytes: of inputs and output gradients at a time.
    """
    for batch in microbatches:
        reached = [uses for uses in batch.passes if uses]
        if not reached:
            continue
        inputs = [extract(use)[0] for use in reached[0]]
        outputs = [[extract(use)[1] for use in uses] for uses in reached]
        rows = batch.counts.nonzero()[:, 0]
        for part in torch.split(rows, _rows_at_a_time([*inputs, *chain(*outputs)], chunk_bytes)):
            yield _positions(inputs, outputs, part, batch.counts, bias, device)


def _positions(
    inputs: list[Tensor], outputs: list[list[Tensor]], rows: Tensor, counts: Tensor, bias: bool, device: torch.device
) -> Positions:
    a = _side_by_side(inputs, rows, device)
    b = [_side_by_side(of_pass, rows, device) for of_pass in outputs]
    return Positions(
        inputs=pad(a, (0, 1), value=1.0) if bias else a,
        outputs=b,
        live=torch.stack([(gradients != 0).any(-1) for gradients in b]).any(0),
        counts=counts[rows].to(device=device, dtype=torch.float64),
    )


def _side_by_side(tensors: Sequence[Tensor], rows: Tensor, device: torch.device) -> Tensor:
    return torch.cat([tensor[rows.to(tensor.device)] for tensor in tensors], 1).to(device)


def _rows_at_a_time(tensors: Sequence[Tensor], chunk_bytes: int) -> int:
    """How many rows fit into `chunk_bytes`, at least one."""
    return max(1, chunk_bytes // max(sum(tensor[0].numel() * tensor.element_size() for tensor in tensors), 1))


@final
class SecondMoment:
    """`sum v v'` over vectors v (d,), kept as the vectors themselves while these are fewer than d."""

    def __init__(self) -> None:
        self._vectors: list[Tensor] = []
        self._matrix: Tensor | None = None
        self._dtype = torch.float64

    def add(self, vectors: Tensor) -> None:
        """Add the products of `vectors` (m, d): float64 sums over products in their dtype."""
        self._dtype = vectors.dtype
        self._vectors.append(vectors)
        if self._matrix is None and sum(map(len, self._vectors)) < vectors.shape[1]:
            return
        products = [gram(part.T) for part in self._vectors]
        self._matrix = sum(products, start=torch.zeros_like(products[0]) if self._matrix is None else self._matrix)
        self._vectors = []

    def factor(self, mass: float) -> Factor:
        """The sum divided by `mass`, or zero where that is; used up by it."""
        scale = 1.0 / mass if mass > 0 else 0.0
        if self._matrix is not None:
            return factor_of_matrix(self._matrix * scale, dtype=self._dtype)
        return factor_of_vectors(torch.cat(self._vectors), scale=scale)
