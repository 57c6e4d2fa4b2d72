"""Uses: how an operation turned a parameter into output, and the per-sample gradients that follow from it.

The forward pass leaves a `Tap`, with the operation's input; a backward pass brings the gradient of the operation's output and
completes the tap to a `Use`, which can give the per-sample gradients, all or in part, without holding them.
"""

import copy
from abc import ABC, abstractmethod
from typing import Final, Self, final

import torch
from torch import Tensor
from typing_extensions import override

from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout

RuleTaps = list[tuple[Tensor, "Tap"]]  # what a rule returns: operands of its operation, each with the tap it vouches for


EMBEDDING: Final = Operation("embedding", has_factors=True, transposed=True)


class Tap(ABC):
    """One operation on a parameter, as the forward pass leaves it: the operation's input, no gradient yet.

    Attributes:
        operation: what used the parameter, and what K-FAC can make of it.
        num_samples: N of the microbatch.
    """

    operation: Operation
    num_samples: int

    @abstractmethod
    def completed(self, gradient: Tensor) -> "Use":
        """The use that follows from the gradient of the operation's output, which has the output's shape.

        Every backward pass over the microbatch asks again.
        """


class Use(Tap):
    """One operation on a parameter with the gradient of its output: gives the parameter's per-sample gradients.

    These are (N, d_1, ...) for a parameter (d_1, ...). Slices along d_1 can be asked for one after the other, so that nobody
    has to hold them all. A use without its gradient is a tap that completes to a copy of itself.

    Attributes:
        gradient: of the operation's output; None until a backward pass reached it.
    """

    gradient: Tensor | None = None

    @override
    def completed(self, gradient: Tensor) -> Self:
        use = copy.copy(self)
        use.complete(gradient)
        return use

    def complete(self, gradient: Tensor) -> None:
        """Take the gradient of the operation's output."""
        self.gradient = gradient

    @abstractmethod
    def slices(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Per-sample gradients of the parameter's slices `start:stop`, (N, stop - start, ...), a new tensor or in `out`."""

    def add_slices(self, total: Tensor, start: int, stop: int) -> None:
        """Add `slices(start, stop)` to `total` in place."""
        total += self.slices(start, stop).reshape(total.shape)

    @abstractmethod
    def restricted(self, chosen: Tensor) -> "Use":
        """The same use of a parameter that has only the slices `chosen` (sorted indices along its first axis)."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What the use holds in memory."""

    @abstractmethod
    def moved(self, device: torch.device) -> Self:
        """The use with its tensors on `device`."""


@final
class OuterProduct(Use):
    """A weight matrix applied to vectors: `g_i = sum_t left_it right_it'`, (N, d_1, d_2) of the matrix (d_1, d_2).

    Args:
        operation: also says whether the matrix is stored as (d_in, d_out), `transposed`, or as (d_out, d_in).
        layout: where the samples are in inputs and outputs; or N, with the samples on axis 0.
        inputs: the operation's input, its last axis d_in.
    """

    def __init__(self, operation: Operation, layout: Layout | int, inputs: Tensor) -> None:
        self.operation = operation
        self._layout = layout if isinstance(layout, Layout) else Layout(layout)
        self.num_samples = self._layout.num_samples
        self._inputs = inputs.detach()  # its graph is not the use's
        self._transposed = operation.transposed
        self._chosen: Tensor | None = None

    @override
    def slices(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        left, right = self.factors()
        if out is None:
            return left[:, :, start:stop].mT @ right
        return torch.bmm(left[:, :, start:stop].mT, right, out=out)

    @override
    def add_slices(self, total: Tensor, start: int, stop: int) -> None:
        left, right = self.factors()
        total.view(len(left), stop - start, -1).baddbmm_(left[:, :, start:stop].mT, right)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(left (N, T, d_1), right (N, T, d_2))` of the matrix (d_1, d_2) as it is stored."""
        inputs, outputs = self.layer_vectors()
        left, right = (inputs, outputs) if self._transposed else (outputs, inputs)
        return (left if self._chosen is None else left[:, :, self._chosen]), right

    def layer_vectors(self) -> tuple[Tensor, Tensor]:
        """`(inputs (N, T, d_in), output gradients (N, T, d_out))`."""
        assert self.gradient is not None
        return self._layout.vectors(self._inputs), self._layout.vectors(self.gradient)

    def transposed(self) -> "OuterProduct":
        """The same use of the transposed matrix."""
        use = copy.copy(self)
        use._transposed = not self._transposed
        return use

    @override
    def restricted(self, chosen: Tensor) -> "OuterProduct":
        use = copy.copy(self)
        use._chosen = chosen if self._chosen is None else self._chosen[chosen]
        return use

    @override
    def tensors(self) -> list[Tensor]:
        return [self._inputs] if self.gradient is None else [self._inputs, self.gradient]

    @override
    def moved(self, device: torch.device) -> "OuterProduct":
        use = copy.copy(self)
        inputs, outputs = self.layer_vectors()
        use._inputs, use.gradient = inputs.to(device), outputs.to(device)
        use._layout = Layout(self.num_samples)
        return use


@final
class Lookup(Use):
    """An embedding table (V, d): the gradient of slice v sums the output gradients where the index is v.

    Args:
        layout: where the samples are in the indices; or N, with the samples on axis 0.
        indices: (N, ...) indices looked up.
        padding_idx: the index that receives no gradient, if any.
    """

    operation = EMBEDDING

    def __init__(self, layout: Layout | int, indices: Tensor, padding_idx: int | None) -> None:
        self._layout = layout if isinstance(layout, Layout) else Layout(layout)
        self.num_samples = self._layout.num_samples
        self.indices = self._layout.vectors(indices[..., None])[..., 0]  # (N, T)
        self._padding_idx = padding_idx

    @override
    def complete(self, gradient: Tensor) -> None:
        self.gradient = self._layout.vectors(gradient)  # (N, T, d)

    def relabelled(self, indices: Tensor) -> "Lookup":
        """The same use of a smaller table, where `indices` (N, T) are the new ones; negative ones are dropped."""
        use = copy.copy(self)
        use.indices, use._padding_idx = indices, None
        return use

    @override
    def restricted(self, chosen: Tensor) -> "Lookup":
        position = torch.searchsorted(chosen, self.indices.contiguous()).clamp_max(max(len(chosen) - 1, 0))
        known = chosen[position] == self.indices if len(chosen) else torch.zeros_like(self.indices, dtype=torch.bool)
        if self._padding_idx is not None:
            known &= self.indices != self._padding_idx
        return self.relabelled(torch.where(known, position, -1))

    def present(self) -> Tensor:
        """(V',) the indices that receive a gradient, each once, sorted."""
        present: Tensor = torch.unique(self.indices)
        return present if self._padding_idx is None else present[present != self._padding_idx]

    @override
    def slices(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        assert self.gradient is not None
        total = self.gradient.new_zeros(self.num_samples, stop - start, self.gradient.shape[-1]) if out is None else out.zero_()
        self.add_slices(total, start, stop)
        return total

    @override
    def add_slices(self, total: Tensor, start: int, stop: int) -> None:
        assert self.gradient is not None
        inside = (self.indices >= start) & (self.indices < stop)
        if self._padding_idx is not None:
            inside &= self.indices != self._padding_idx
        samples = torch.arange(self.num_samples, device=inside.device)[:, None].expand_as(inside)
        target = samples[inside] * (stop - start) + self.indices[inside] - start
        total.view(-1, self.gradient.shape[-1]).index_add_(0, target, self.gradient[inside])

    @override
    def tensors(self) -> list[Tensor]:
        return [self.indices] if self.gradient is None else [self.indices, self.gradient]

    @override
    def moved(self, device: torch.device) -> "Lookup":
        assert self.gradient is not None
        use = copy.copy(self)
        use.indices, use.gradient = self.indices.to(device), self.gradient.to(device)
        return use


@final
class Dense(Use):
    """Per-sample gradients as they are, (N, d_1, ...): where they are no larger than the output (biases, scales).

    Args:
        operation: what used the parameter.
        gradient: (N, d_1, ...).
    """

    gradient: Tensor

    def __init__(self, operation: Operation, gradient: Tensor) -> None:
        self.operation = operation
        self.num_samples = len(gradient)
        self.gradient = gradient

    @override
    def slices(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        part = self.gradient[:, start:stop]
        return part.clone() if out is None else out.copy_(part.reshape(out.shape))

    def matrix(self) -> Tensor:
        """(N, P) per-sample gradients, P the parameter's elements; not to be changed."""
        return self.gradient.flatten(1)

    @override
    def restricted(self, chosen: Tensor) -> "Dense":
        return Dense(self.operation, self.gradient[:, chosen])

    @override
    def tensors(self) -> list[Tensor]:
        return [self.gradient]

    @override
    def moved(self, device: torch.device) -> "Dense":
        return Dense(self.operation, self.gradient.to(device))
