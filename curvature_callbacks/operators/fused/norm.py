"""Layer norms, by the kernels of their first derivative."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from curvature_callbacks.library_internals.tensors import layer_norm_backward
from curvature_callbacks.operators.fused.order import Gradients, Order, no_further


def layer_norm(
    order: Order,
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`input` (..., *shape) normalised over the last axes, scaled by `weight` and shifted by `bias`, both of `shape`."""
    result: Tensor = _LayerNorm.apply(input, weight, bias, tuple(shape), eps, order)  # type: ignore[no-untyped-call]
    return result


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
        order: Order,
    ) -> Tensor:
        result, mean, scale = torch.native_layer_norm(input, shape, weight, bias, eps)
        ctx.norm, ctx.order = _Norm(shape, eps), order
        ctx.save_for_backward(input, weight, mean, scale)
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Gradients:
        ctx.order.check()
        input, weight, mean, scale = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            held = ctx.order.constant(input, weight)
            found: Gradients = _LayerNormAdjoint.apply(g, *held, mean, scale, ctx.norm, needs)  # type: ignore[no-untyped-call]
        else:
            found = ctx.norm.adjoint(g, input, weight, mean, scale, needs)
        return *found, None, None, None


class _LayerNormAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        norm: "_Norm",
        needs: list[bool],
    ) -> Gradients:
        ctx.set_materialize_grads(False)
        ctx.norm = norm
        ctx.save_for_backward(g if any(ctx.needs_input_grad[1:3]) else None, input, weight, mean, scale)
        return norm.adjoint(g, input, weight, mean, scale, needs)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, V: Tensor | None, b: Tensor | None) -> Gradients:
        """By g, input and weight, for changes of the input's gradient, the weight's and the bias's.

        With `u = r P v` and `h = c g`: by g `c u + z V + b`, by c the sum of `g u`, by x
        `r P (V g - r (mean(h z) v + mean(v z) h)) - r^2 z (mean(v h) - mean(v) mean(h) - mean(v z) mean(h z))`.
        """
        no_further()
        g, input, weight, mean, scale = ctx.saved_tensors
        norm, (by_g, by_input, by_weight) = ctx.norm, ctx.needs_input_grad[:3]
        u = None if v is None or not (by_g or by_weight) else norm.projected(v, input, mean, scale)
        return (
            norm.change(u, V, b, input, weight) if by_g else None,
            norm.curvature(g, v, V, input, weight, mean, scale) if by_input else None,
            None if u is None or not by_weight else norm.summed(g * u),
            None,
            None,
            None,
            None,
        )


@final
@dataclass(frozen=True, slots=True)
class _Norm:
    """The normalisation over the last axes, of `shape`."""

    shape: tuple[int, ...]
    eps: float

    def adjoint(
        self, g: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, needs: list[bool]
    ) -> Gradients:
        """Gradients by input, weight and bias."""
        found = layer_norm_backward(g, input, self.shape, mean, scale, weight, weight, needs)
        return tuple(one if need else None for one, need in zip(found, needs, strict=True))

    def projected(self, v: Tensor, input: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """`r P v`."""
        found: Tensor | None = self.adjoint(v, input, None, mean, scale, [True, False, False])[0]
        assert found is not None
        return found

    def change(
        self, u: Tensor | None, V: Tensor | None, b: Tensor | None, input: Tensor, weight: Tensor | None
    ) -> Tensor | None:
        """`c u + z V + b`; overwrites nothing."""
        if u is not None and weight is not None:
            u = u * weight
        if V is not None:
            added: Tensor = torch.native_layer_norm(input, self.shape, V, b, self.eps)[0]  # z V + b
            return added if u is None else added.add_(u)
        if b is None:
            return u
        return b.expand(input.shape) if u is None else u + b

    def curvature(
        self,
        g: Tensor,
        v: Tensor | None,
        V: Tensor | None,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        scale: Tensor,
    ) -> Tensor | None:
        """The change of the input's own gradient."""
        if v is None:
            return None if V is None else self.projected(V * g, input, mean, scale)
        h = g if weight is None else g * weight
        z = (input - mean).mul_(scale)
        hz, vz, vh = self._mean(h, z), self._mean(v, z), self._mean(v, h)
        inner = (v * (hz * -scale)).addcmul_(h, vz * -scale)
        if V is not None:
            inner.addcmul_(g, V)
        rest = vh - self._mean(v) * self._mean(h) - vz * hz
        return self.projected(inner, input, mean, scale).addcmul_(z, rest * scale.square(), value=-1)

    def summed(self, tensor: Tensor) -> Tensor:
        """Over all but the normalised axes."""
        return tensor.sum_to_size(self.shape)

    def _mean(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Of the entries of one row, or of the products of two."""
        axes = tuple(range(-len(self.shape), 0))
        if second is None:
            return first.mean(axes, keepdim=True)
        found: Tensor
        if len(axes) == 1:
            found = torch.linalg.vecdot(first, second)[..., None] / self.shape[0]
        else:
            found = (first * second).mean(axes, keepdim=True)
        return found
