"""Uses: how one operation turned a parameter into output, and the per-sample gradient that follows from it.

A use is recorded in the forward pass with the operation's input and completed in the backward pass with the gradient of its
output. Axis 0 of both is the sample, which the random-sign certificate proves.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor


class Use(ABC):
    """One use of a parameter by one microbatch; `rows` needs `complete` first.

    Attributes:
        kind: name of the operation, also what decides whether K-FAC has factors for it.
        num_samples: N of the microbatch.
        gradient: gradient of the operation's output, None until the backward pass reached it.
    """

    kind: str
    num_samples: int
    gradient: Tensor | None = None

    def complete(self, gradient: Tensor) -> None:
        """Take the gradient of the output."""
        self.gradient = gradient

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Per-sample gradients of the parameter's rows `start:stop`, (N, stop - start, ...), a new tensor."""

    def add_rows(self, total: Tensor, start: int, stop: int) -> None:
        """Add `rows(start, stop)` to `total` in place."""
        total += self.rows(start, stop)


@final
class OuterProduct(Use):
    """A weight matrix applied to vectors: `g_i = sum_t left_it right_it'`.

    Args:
        kind: `linear` or `conv1d` (Hugging Face's transposed linear).
        num_samples: N.
        inputs: the operation's input, (N, ..., d_in) or (N T, d_in) with the samples' positions together.
        transposed: whether the weight is (d_in, d_out).
    """

    def __init__(self, kind: str, num_samples: int, inputs: Tensor, *, transposed: bool) -> None:
        self.kind = kind
        self.num_samples = num_samples
        self._inputs = inputs
        self._transposed = transposed

    def rows(self, start: int, stop: int) -> Tensor:
        """`left[:, :, start:stop]' right` per sample."""
        left, right = self.factors()
        return left[:, :, start:stop].mT @ right

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(left (N, T, rows), right (N, T, columns))`."""
        assert self.gradient is not None
        inputs, outputs = self._by_sample(self._inputs), self._by_sample(self.gradient)
        return (inputs, outputs) if self._transposed else (outputs, inputs)

    def _by_sample(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.num_samples, -1, tensor.shape[-1])  # (N, T, d)


@final
class Lookup(Use):
    """An embedding table: the gradient of row `v` sums the output gradients where the index is `v`.

    Args:
        num_samples: N.
        indices: (N, ...) rows looked up.
        padding_idx: the row that receives no gradient, if any.
    """

    kind = "embedding"

    def __init__(self, num_samples: int, indices: Tensor, padding_idx: int | None) -> None:
        self.num_samples = num_samples
        self.indices = indices.reshape(num_samples, -1)  # (N, T)
        self._padding_idx = padding_idx

    def relabelled(self, indices: Tensor) -> "Lookup":
        """The same use of a table with fewer rows, where `indices` (N, T) are the new ones; negative ones are dropped."""
        use = Lookup(self.num_samples, indices, None)
        use.gradient = self.gradient
        return use

    def present_rows(self) -> Tensor:
        """Sorted rows that receive a gradient."""
        present: Tensor = torch.unique(self.indices)
        return present if self._padding_idx is None else present[present != self._padding_idx]

    def rows(self, start: int, stop: int) -> Tensor:
        """Scattered sums of the output gradients, (N, stop - start, d)."""
        assert self.gradient is not None
        total = self.gradient.new_zeros(self.num_samples, stop - start, self.gradient.shape[-1])
        self.add_rows(total, start, stop)
        return total

    def add_rows(self, total: Tensor, start: int, stop: int) -> None:
        """Only the rows that were looked up are touched."""
        assert self.gradient is not None
        outputs = self.gradient.reshape(-1, self.gradient.shape[-1])  # (N T, d)
        inside = (self.indices >= start) & (self.indices < stop)
        if self._padding_idx is not None:
            inside &= self.indices != self._padding_idx
        samples = torch.arange(self.num_samples, device=inside.device)[:, None].expand_as(inside)
        target = samples[inside] * (stop - start) + self.indices[inside] - start
        total.view(-1, total.shape[-1]).index_add_(0, target, outputs[inside.flatten()])


@final
class Elementwise(Use):
    """A parameter that scales or shifts activations: `g_i` is the output gradient, times the factor, summed to its shape.

    Args:
        kind: `bias`, `scale` or `shift`.
        num_samples: N.
        shape: the parameter's shape.
        factor: gives what the parameter was multiplied with, (N, ...) or (N T, ...); None for an addition.
    """

    def __init__(self, kind: str, num_samples: int, shape: torch.Size, factor: Callable[[], Tensor] | None = None) -> None:
        self.kind = kind
        self.num_samples = num_samples
        self._shape = shape
        self._factor = factor

    def complete(self, gradient: Tensor) -> None:
        """Reduce at once: a per-sample gradient is no larger than the output."""
        value = gradient if self._factor is None else gradient * self._factor()
        if value.shape[0] != self.num_samples:
            value = value.reshape(self.num_samples, -1, *value.shape[1:])  # (N, T, ...)
        shape = self._shape[1:] if len(self._shape) == value.ndim else self._shape
        ones = (1,) * (value.ndim - 1 - len(shape))
        reduced = value.sum_to_size(self.num_samples, *ones, *shape)
        self.gradient = reduced.reshape(self.num_samples, *(self._shape or (1,)))
        self._factor = None

    def rows(self, start: int, stop: int) -> Tensor:
        """A slice of the per-sample gradients."""
        assert self.gradient is not None
        return self.gradient[:, start:stop].clone()
