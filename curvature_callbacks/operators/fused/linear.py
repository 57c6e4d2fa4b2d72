"""Linear layers: sums of products are formed inside the products."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks.library_internals.tensors import unsafe_view
from curvature_callbacks.operators.fused.order import Gradients, Order, no_further


def linear(order: Order, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input @ weight.T + bias` for `input` (..., in), `weight` (out, in) and `bias` (out,)."""
    result: Tensor = _Linear.apply(input, weight, bias, order)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, order: Order) -> Tensor:
        by_input, by_weight, *_ = ctx.needs_input_grad
        ctx.order = order
        ctx.save_for_backward(input if by_weight else None, weight if by_input else None)
        rows = F.linear(_rows(input), weight, bias)
        shape = [*input.shape[:-1], len(weight)]
        result: Tensor = unsafe_view(rows, shape)  # a view could not be changed in place
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Gradients:
        ctx.order.check()
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            held = ctx.order.constant(input, weight)
            found: Gradients = _LinearAdjoint.apply(g, *held, needs)  # type: ignore[no-untyped-call]
        else:
            found = _linear_adjoint(g, input, weight, needs)
        return *found, None


class _LinearAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, input: Tensor | None, weight: Tensor | None, needs: Sequence[bool]) -> Gradients:
        ctx.set_materialize_grads(False)
        ctx.shape = g.shape
        ctx.save_for_backward(g if any(ctx.needs_input_grad[1:3]) else None, input, weight)
        return _linear_adjoint(g, input, weight, needs)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, V: Tensor | None, b: Tensor | None) -> Gradients:
        """By g, input and weight, for changes of the input's gradient, the weight's and the bias's."""
        no_further()
        g, input, weight = ctx.saved_tensors
        by_g, by_input, by_weight, _ = ctx.needs_input_grad
        return (
            _change(ctx.shape, (input, V), (v, weight), b=b) if by_g else None,
            None if V is None or not by_input else _times(g, V),
            None if v is None or not by_weight else _rows(g).T @ _rows(v),
            None,
        )


def _linear_adjoint(g: Tensor, input: Tensor | None, weight: Tensor | None, needs: Sequence[bool]) -> Gradients:
    by_input, by_weight, by_bias = needs
    return (
        _times(g, weight) if by_input and weight is not None else None,
        _rows(g).T @ _rows(input) if by_weight and input is not None else None,
        _rows(g).sum(0) if by_bias else None,
    )


def _change(shape: torch.Size, *products: tuple[Tensor | None, Tensor | None], b: Tensor | None) -> Tensor | None:
    """`x V' + v W' + b` of that shape, added up inside the products; what is None counts for nothing."""
    result: Tensor | None = None
    for left, right in products:
        if left is None or right is None:
            continue
        if result is not None:
            result.addmm_(_rows(left), right.T)
        else:
            result = _rows(left) @ right.T if b is None else torch.addmm(b, _rows(left), right.T)
    if result is not None:
        return result.view(shape)
    return None if b is None else b.expand(shape)


def _times(tensor: Tensor, matrix: Tensor) -> Tensor:
    """`tensor @ matrix` as one product: `@` would copy the matrix for every entry of the first axis."""
    return (_rows(tensor) @ matrix).view(*tensor.shape[:-1], matrix.shape[1])


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])  # of no entries -1 would say nothing
