"""Uses: how one operation turned a parameter into output, and the per-sample gradient that follows from it.

A use is recorded in the forward pass with the operation's input and completed in a backward pass with the gradient of its
output.
"""

import copy
from abc import ABC, abstractmethod
from typing import Self, final

import torch
from torch import Tensor

from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout


class Tap(ABC):
    """What the forward pass leaves behind where a parameter is used.

    Attributes:
        operation: what used the parameter.
        num_samples: N of the microbatch.
    """

    operation: Operation
    num_samples: int

    @abstractmethod
    def completed(self, gradient: Tensor) -> "Use":
        """The use that follows from the gradient of the operation's output; may be asked again by another backward pass."""


class Use(Tap):
    """One use of a parameter by one microbatch; `rows` needs `complete` first.

    Attributes:
        gradient: gradient of the operation's output, None until a backward pass reached it.
    """

    gradient: Tensor | None = None

    def completed(self, gradient: Tensor) -> Self:
        """A copy with the gradient of the output."""
        use = copy.copy(self)
        use.complete(gradient)
        return use

    def complete(self, gradient: Tensor) -> None:
        """Take the gradient of the output."""
        self.gradient = gradient

    @abstractmethod
    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Per-sample gradients of the parameter's rows `start:stop`, (N, stop - start, ...), a new tensor or in `out`."""

    def add_rows(self, total: Tensor, start: int, stop: int) -> None:
        """Add `rows(start, stop)` to `total` in place."""
        total += self.rows(start, stop).reshape(total.shape)

    @abstractmethod
    def restricted(self, rows: Tensor) -> "Use":
        """The same use of a parameter that has only the given rows (sorted indices)."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What the use holds in memory."""

    @abstractmethod
    def moved(self, device: torch.device) -> Self:
        """The use with its tensors on `device`."""


@final
class OuterProduct(Use):
    """A weight matrix applied to vectors: `g_i = sum_t left_it right_it'`.

    Args:
        operation: how it is stored, `transposed` or not, among others.
        layout: where the samples are in inputs and outputs; or N, with the samples on axis 0.
        inputs: the operation's input, its last axis d_in.
    """

    def __init__(self, operation: Operation, layout: Layout | int, inputs: Tensor) -> None:
        self.operation = operation
        self._layout = layout if isinstance(layout, Layout) else Layout(layout)
        self.num_samples = self._layout.num_samples
        self._inputs = inputs.detach()  # its graph is not the use's
        self._transposed = operation.transposed
        self._rows: Tensor | None = None

    @property
    def is_product(self) -> bool:
        """Whether it is a plain matrix product of its factors."""
        return True

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """`left[:, :, start:stop]' right` per sample."""
        left, right = self.factors()
        if out is None:
            return left[:, :, start:stop].mT @ right
        return torch.bmm(left[:, :, start:stop].mT, right, out=out)

    def add_rows(self, total: Tensor, start: int, stop: int) -> None:
        """Accumulated by the product itself."""
        left, right = self.factors()
        total.view(len(left), stop - start, -1).baddbmm_(left[:, :, start:stop].mT, right)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(left (N, T, rows), right (N, T, columns))`."""
        assert self.gradient is not None
        inputs, outputs = self._layout.vectors(self._inputs), self._layout.vectors(self.gradient)
        left, right = (inputs, outputs) if self._transposed else (outputs, inputs)
        return (left if self._rows is None else left[:, :, self._rows]), right

    def layer_vectors(self) -> tuple[Tensor, Tensor]:
        """`(inputs (N, T, d_in), output gradients (N, T, d_out))`."""
        left, right = self.factors()
        return (left, right) if self._transposed else (right, left)

    def transposed(self) -> "OuterProduct":
        """The same use of the transposed matrix."""
        use = copy.copy(self)
        use._transposed = not self._transposed
        return use

    def restricted(self, rows: Tensor) -> "OuterProduct":
        """Fewer rows on the left."""
        use = copy.copy(self)
        use._rows = rows if self._rows is None else self._rows[rows]
        return use

    def tensors(self) -> list[Tensor]:
        """Input and output gradient."""
        return [self._inputs] if self.gradient is None else [self._inputs, self.gradient]

    def moved(self, device: torch.device) -> "OuterProduct":
        """Both factors, the sample's positions together."""
        assert self.gradient is not None
        use = copy.copy(self)
        use._inputs = self._layout.vectors(self._inputs).to(device)
        use.gradient = self._layout.vectors(self.gradient).to(device)
        use._layout = Layout(self.num_samples)
        return use


@final
class Lookup(Use):
    """An embedding table: the gradient of row `v` sums the output gradients where the index is `v`.

    Args:
        layout: where the samples are in the indices; or N, with the samples on axis 0.
        indices: (N, ...) rows looked up.
        padding_idx: the row that receives no gradient, if any.
    """

    operation = Operation("embedding", has_factors=True, transposed=True)

    def __init__(self, layout: Layout | int, indices: Tensor, padding_idx: int | None) -> None:
        self._layout = layout if isinstance(layout, Layout) else Layout(layout)
        self.num_samples = self._layout.num_samples
        self.indices = self._by_sample(indices[..., None])[..., 0]  # (N, T)
        self._padding_idx = padding_idx

    def complete(self, gradient: Tensor) -> None:
        """The output gradients as (N, T, d), rows without gradient left out of the indices."""
        self.gradient = self._by_sample(gradient)

    def _by_sample(self, tensor: Tensor) -> Tensor:
        return self._layout.vectors(tensor)

    def relabelled(self, indices: Tensor) -> "Lookup":
        """The same use of a table with fewer rows, where `indices` (N, T) are the new ones; negative ones are dropped."""
        use = copy.copy(self)
        use.indices, use._padding_idx = indices, None
        return use

    def on(self, present: Tensor) -> "Lookup":
        """The same use of the table that holds only the rows `present` (sorted)."""
        place = torch.searchsorted(present, self.indices.contiguous()).clamp_max(max(len(present) - 1, 0))
        known = present[place] == self.indices if len(present) else torch.zeros_like(self.indices, dtype=torch.bool)
        if self._padding_idx is not None:
            known &= self.indices != self._padding_idx
        return self.relabelled(torch.where(known, place, -1))

    def restricted(self, rows: Tensor) -> "Lookup":
        """The same as `on`."""
        return self.on(rows)

    def present_rows(self) -> Tensor:
        """Sorted rows that receive a gradient."""
        present: Tensor = torch.unique(self.indices)
        return present if self._padding_idx is None else present[present != self._padding_idx]

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Scattered sums of the output gradients, (N, stop - start, d)."""
        assert self.gradient is not None
        total = self.gradient.new_zeros(self.num_samples, stop - start, self.gradient.shape[-1]) if out is None else out.zero_()
        self.add_rows(total, start, stop)
        return total

    def add_rows(self, total: Tensor, start: int, stop: int) -> None:
        """Only the rows that were looked up are touched."""
        assert self.gradient is not None
        inside = (self.indices >= start) & (self.indices < stop)
        if self._padding_idx is not None:
            inside &= self.indices != self._padding_idx
        samples = torch.arange(self.num_samples, device=inside.device)[:, None].expand_as(inside)
        target = samples[inside] * (stop - start) + self.indices[inside] - start
        total.view(-1, self.gradient.shape[-1]).index_add_(0, target, self.gradient[inside])

    def tensors(self) -> list[Tensor]:
        """Indices and output gradient."""
        return [self.indices] if self.gradient is None else [self.indices, self.gradient]

    def moved(self, device: torch.device) -> "Lookup":
        """Indices and output gradient."""
        assert self.gradient is not None
        use = copy.copy(self)
        use.indices, use.gradient = self.indices.to(device), self.gradient.to(device)
        return use


@final
class Dense(Use):
    """Per-sample gradients as they are, (N, rows, ...)."""

    def __init__(self, operation: Operation, gradient: Tensor) -> None:
        self.operation = operation
        self.num_samples = len(gradient)
        self.gradient = gradient

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """A slice of the per-sample gradients."""
        assert self.gradient is not None
        piece = self.gradient[:, start:stop]
        return piece.clone() if out is None else out.copy_(piece.reshape(out.shape))

    def whole(self) -> Tensor:
        """(N, P) per-sample gradients, not to be changed."""
        assert self.gradient is not None
        return self.gradient.flatten(1)

    def restricted(self, rows: Tensor) -> "Dense":
        """Fewer rows."""
        assert self.gradient is not None
        return Dense(self.operation, self.gradient[:, rows])

    def tensors(self) -> list[Tensor]:
        """The per-sample gradients."""
        assert self.gradient is not None
        return [self.gradient]

    def moved(self, device: torch.device) -> "Dense":
        """The per-sample gradients."""
        assert self.gradient is not None
        return Dense(self.operation, self.gradient.to(device))
