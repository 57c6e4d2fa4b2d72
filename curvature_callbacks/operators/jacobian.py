"""Jacobian: products with J and J' of one microbatch's outputs, through two graphs that are built once."""

from collections.abc import Iterator, Sequence
from typing import Protocol, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from typing_extensions import override

from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.operators.graphs import ProductGraph


@final
class Jacobian:
    """J of `outputs` in the `leaves`: no output-by-parameter matrix, two backward passes.

    `J'w` is built once as a graph that is linear in a dummy w, and differentiated by w for `J v`; the outputs' own graph gives
    `J'u`. Assumed and unchecked: every operation is twice differentiable (`check_adjoint` tests it).

    Args:
        outputs: of any shape, differentiable. Their values are not kept here.
        leaves: what to differentiate by.

    Attributes:
        is_finite: whether `J'0` is: false where a slope on the way is infinite or not a number.

    Cost: one backward pass to build, 0.7 gradients for either product; memory about that of the outputs' own graph again.
    """

    def __init__(self, outputs: Tensor, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self._shape, self._dtype, self._device = outputs.shape, outputs.dtype, outputs.device
        self._outputs = get_gradient_edge(outputs) if outputs.requires_grad else None
        # One number in memory, seen as many: the dummy of a language model's logits would be as large as they are.
        self._dummy = torch.zeros((), dtype=outputs.dtype, device=outputs.device).expand(outputs.shape).requires_grad_()
        self._lines: list[GradientEdge | None] = [None] * len(leaves)
        self.is_finite = True
        if outputs.requires_grad:
            self._build(outputs)

    @property
    def num_outputs(self) -> int:
        """S, the number of outputs: the length of `J v`."""
        return self._shape.numel()

    def jvp(self, parts: Sequence[Tensor]) -> Tensor:
        """`J v`, in the outputs' shape, for v leaf by leaf."""
        used = [(line, part) for line, part in zip(self._lines, parts, strict=True) if line is not None]
        if not used:
            return torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        lines, weights = zip(*used, strict=True)
        (product,) = torch.autograd.grad(
            lines, [self._dummy], weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    def vjp(self, u: Tensor) -> list[Tensor | None]:
        """`J' u` leaf by leaf for u in the outputs' shape; None where the outputs do not depend on the leaf."""
        if self._outputs is None:
            return [None] * len(self._leaves)
        return list(torch.autograd.grad([self._outputs], self._leaves, [u], retain_graph=True, allow_unused=True))

    def nodes(self) -> Iterator[Node]:
        """The nodes at which both graphs start, for their size."""
        for edge in (self._outputs, *self._lines):
            if edge is not None:
                yield edge.node

    def _build(self, outputs: Tensor) -> None:
        """Edges of `J'w` at w = 0, leaf by leaf: the values, as many as there are parameters, are let go."""
        values = torch.autograd.grad(outputs, self._leaves, self._dummy, create_graph=True, allow_unused=True)
        lines = [line if line is not None and line.requires_grad else None for line in values]
        self._lines = [None if line is None else get_gradient_edge(line) for line in lines]
        self.is_finite = all(bool(line.detach().isfinite().all()) for line in lines if line is not None)


class LossJacobian(ProductGraph, Protocol):
    """The Jacobian J (S, P) of the single losses of one microbatch; its product is `J' J v`.

    Attributes:
        valid: (N,) bool on the CPU, rows with a valid target: only their losses count.
        num_targets: valid targets.
        num_losses: S, how many losses there are: of rows, or of targets, for every draw.
        is_finite: whether losses and slopes are.
    """

    valid: Tensor
    num_targets: int
    num_losses: int
    is_finite: bool

    def jvp(self, parts: Sequence[Tensor]) -> Tensor:
        """`J v` (S,) for v leaf by leaf."""
        ...

    def vjp(self, u: Tensor) -> list[Tensor | None]:
        """`J' u` leaf by leaf for `u` (S,)."""
        ...


@final
class DirectLossJacobian(LossJacobian):
    """`LossJacobian` through the graph of the losses themselves.

    Args:
        losses: of the microbatch.
        each: (N,) or (N, M) the single ones, differentiable.
        leaves: what to differentiate by.
    """

    def __init__(self, losses: SampleLosses, each: Tensor, leaves: Sequence[Tensor]) -> None:
        self.valid = losses.num_targets.cpu() > 0
        self.num_targets = int(losses.num_targets.sum())
        self._losses = each[self.valid.to(each.device)].flatten()  # (S,)
        self._jacobian = Jacobian(self._losses, leaves)
        self._losses = self._losses.detach()
        self.num_losses = len(self._losses)
        self.is_finite = self._jacobian.is_finite and bool(self._losses.isfinite().all())

    @override
    def jvp(self, parts: Sequence[Tensor]) -> Tensor:
        return self._jacobian.jvp(parts)

    @override
    def vjp(self, u: Tensor) -> list[Tensor | None]:
        return self._jacobian.vjp(u.to(self._losses))

    @override
    def product(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        return self._jacobian.vjp(self._jacobian.jvp(parts))

    @override
    def nodes(self) -> Iterator[Node]:
        return self._jacobian.nodes()

    @override
    def tensors(self) -> tuple[Tensor]:
        return (self._losses,)


@final
class SlopedLossJacobian(LossJacobian):
    """`LossJacobian` as slopes of the losses in the logits times the logits' Jacobian: nothing of the loss in a product.

    Through the losses' own graph a product with GPT-2 (5000 classes) took 10 % longer and its graphs 14 % more memory.

    Args:
        losses: of the microbatch.
        logits: (N, M, C) of its targets, differentiable.
        slopes: (N, M, C) each; every one gives a loss to every row, or every target of it.
        by_target: whether a loss is that of a target rather than of a row.
        leaves: what to differentiate by.
    """

    def __init__(
        self, losses: SampleLosses, logits: Tensor, slopes: Sequence[Tensor], leaves: Sequence[Tensor], *, by_target: bool
    ) -> None:
        self.valid = losses.num_targets.cpu() > 0
        self.num_targets = int(losses.num_targets.sum())
        self._jacobian = Jacobian(logits, leaves)
        self._slopes = slopes
        self._by_target = by_target
        self._rows = self.valid.nonzero()[:, 0].to(logits.device)
        self.num_losses = len(slopes) * len(self._rows) * (logits.shape[1] if by_target else 1)
        finite = [self._jacobian.is_finite, *(bool(part.isfinite().all()) for part in (losses.total.detach(), *slopes))]
        self.is_finite = all(finite)

    @override
    def jvp(self, parts: Sequence[Tensor]) -> Tensor:
        change = self._jacobian.jvp(parts)  # (N, M, C)
        by_target = [torch.linalg.vecdot(slope, change)[self._rows] for slope in self._slopes]  # (n, M) each
        return torch.cat([changes.flatten() if self._by_target else changes.sum(1) for changes in by_target])

    @override
    def vjp(self, u: Tensor) -> list[Tensor | None]:
        first, draws = self._slopes[0], len(self._slopes)
        width = first.shape[1] if self._by_target else 1
        weights = first.new_zeros(draws, len(first), width, 1)
        weights[:, self._rows] = u.to(first).reshape(draws, len(self._rows), width, 1)
        total = weights[0] * first
        for weight, slope in zip(weights[1:], self._slopes[1:], strict=True):
            total.addcmul_(weight, slope)
        return self._jacobian.vjp(total)

    @override
    def product(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        return self.vjp(self.jvp(parts))

    @override
    def nodes(self) -> Iterator[Node]:
        return self._jacobian.nodes()

    @override
    def tensors(self) -> Sequence[Tensor]:
        return self._slopes
