"""Pointwise functions, by their slopes, computed once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvature_callbacks.operators.fused.order import Gradients, Order, no_further


def pointwise(order: Order, input: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(input)`, of which every entry depends on the same entry of `input` alone.

    Its derivatives are computed once, when the graph is built.
    """
    edge = _Edge.apply(input) if order.curved else None  # type: ignore[no-untyped-call]
    result: Tensor = _Pointwise.apply(input, edge, function, order)  # type: ignore[no-untyped-call]
    return result


class _Edge(torch.autograd.Function):
    """The place of a tensor in the graph without its values: one number in memory, in its shape."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.new_zeros(()).expand(input.shape)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return v


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, edge: Tensor | None, function: Callable[[Tensor], Tensor], order: Order) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(edge, *_derivatives(function, input, curved=order.curved))
        value = function(input)
        return value.clone() if value.data_ptr() == input.data_ptr() else value  # the identity's is to be changed in place

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Gradients:
        ctx.order.check()
        edge, slope, curvature = ctx.saved_tensors
        if torch.is_grad_enabled() and edge is not None:
            found: Tensor = _PointwiseAdjoint.apply(g, edge, slope, curvature)  # type: ignore[no-untyped-call]
            return found, None, None, None
        return g * slope, None, None, None


class _PointwiseAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, edge: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
        ctx.save_for_backward(g if ctx.needs_input_grad[1] else None, slope, curvature)
        return g * slope

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Gradients:
        no_further()
        g, slope, curvature = ctx.saved_tensors
        by_g, by_input = ctx.needs_input_grad[:2]
        return v * slope if by_g else None, (v * g).mul_(curvature) if by_input else None, None, None


def _derivatives(function: Callable[[Tensor], Tensor], input: Tensor, *, curved: bool) -> tuple[Tensor, Tensor | None]:
    """`f'(x)` and, where asked for, `f''(x)`.

    In float64: in float32 the second derivative of a GELU by tanh was off by 3e-6, its terms cancel.
    """
    with torch.enable_grad():
        x = input.detach().double().requires_grad_()
        value = function(x)
        (slope,) = torch.autograd.grad(value, x, torch.ones_like(value), create_graph=curved)
        if not curved:
            return slope.to(input.dtype), None
        if not slope.requires_grad:  # piecewise linear
            return slope.to(input.dtype), torch.zeros_like(input)
        (curvature,) = torch.autograd.grad(slope, x, torch.ones_like(slope))
    return slope.detach().to(input.dtype), curvature.to(input.dtype)
