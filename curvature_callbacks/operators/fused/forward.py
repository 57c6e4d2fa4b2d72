"""Forward passes whose layers have derivatives of a few kernels, for graphs that are multiplied many times."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeVar, final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvature_callbacks.library_internals.frameworks import is_activation
from curvature_callbacks.library_internals.modules import has_global_forward_hooks
from curvature_callbacks.library_internals.tensors import functorch_is_active, without_torch_function
from curvature_callbacks.model.loss.cross_entropy_kernel import fused_cross_entropy
from curvature_callbacks.operators.fused.linear import linear
from curvature_callbacks.operators.fused.norm import layer_norm
from curvature_callbacks.operators.fused.order import DifferentiatesItselfError, Order
from curvature_callbacks.operators.fused.pointwise import pointwise

R = TypeVar("R")

_POINTWISE: Final = (F.gelu, F.silu, F.mish)  # whose own second derivatives are composed of many kernels


def fused(forward: Callable[[], R], modules: Sequence[nn.Module], *, curved: bool) -> R:
    """What `forward` gives, with a graph for second derivatives, or with `curved` False for products with a Jacobian alone.

    The values are PyTorch's. Linear layers, layer norms, pointwise activations and (`curved`) cross-entropies of plain float32
    or float64 tensors on a CPU or CUDA get nodes of their own; everything else keeps PyTorch's. A pass that takes derivatives
    inside itself is run again with PyTorch's nodes alone, since ours are differentiated no further.

    Cost: the pass itself, and first (second) derivatives of the activations, once. Products then take, on one thread of a CPU,
    0.87 of the time for the GGN of a ViT or GPT-2, 0.87 to 0.95 for their Hessian.

    Args:
        forward: a forward pass in evaluation mode.
        modules: that it may run.
        curved: whether second derivatives will be asked for.
    """
    order = Order(curved=curved)
    try:
        with _activations(modules, order), _Layers(order):
            result = forward()
    except DifferentiatesItselfError:
        pass
    finally:
        order.is_forward = False
    return forward() if order.refused else result  # whoever may have caught the error


@final
class _Layers(TorchFunctionMode):
    """Puts the layers' own nodes in place of PyTorch's."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self._order = order

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, with a node of its own where there is one."""
        kwargs = kwargs or {}
        if func is F.cross_entropy and self._order.curved:
            return fused_cross_entropy(*args, **kwargs)
        own = None if func not in _OWN else _OWN[func](self._order, *args, **kwargs)
        return func(*args, **kwargs) if own is None else own


def _linear(order: Order, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    shaped = input.ndim > 1 and weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
    if not shaped or not _fits(input, weight, bias):
        return None
    return linear(order, input, weight, bias)


def _addmm(order: Order, input: Tensor, mat1: Tensor, mat2: Tensor, **scaled: Any) -> Tensor | None:
    if scaled or input.shape != mat2.shape[1:] or not _fits(input, mat1, mat2):
        return None
    return linear(order, mat1, mat2.T, input)


def _layer_norm(
    order: Order,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    return layer_norm(order, input, normalized_shape, weight, bias, eps) if _fits(input, weight, bias) else None


def _pointwise(function: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    def own(order: Order, input: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor | None:
        if inplace or not _fits(input):
            return None
        return pointwise(order, input, lambda x: function(x, *args, **kwargs))

    return own


_OWN: Final[Mapping[Any, Callable[..., Tensor | None]]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.layer_norm: _layer_norm,
    **{function: _pointwise(function) for function in _POINTWISE},
}


def _fits(input: Tensor, *others: Tensor | None) -> bool:
    """Whether these are plain tensors of one kind, and somebody wants a gradient by them."""
    tensors = [tensor for tensor in (input, *others) if tensor is not None]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided for tensor in tensors)
        and input.dtype in (torch.float32, torch.float64)
        and input.device.type in ("cpu", "cuda")
        and all((tensor.dtype, tensor.device) == (input.dtype, input.device) for tensor in tensors)
        and not torch.is_autocast_enabled(input.device.type)
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and not functorch_is_active()
        and all(_is_primal(tensor) for tensor in tensors)
    )


def _is_primal(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is None  # type: ignore[no-untyped-call]


@contextmanager
def _activations(modules: Sequence[nn.Module], order: Order) -> Iterator[None]:
    """Modules of one pointwise function give one node, however many operations they are composed of."""

    def replace(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not _fits(inputs[0]):
            return output
        with without_torch_function():
            return pointwise(order, inputs[0], module.forward)

    with ExitStack() as stack:
        for module in modules if not has_global_forward_hooks() else ():  # these come first
            if is_activation(module):
                handle = module.register_forward_hook(replace, prepend=True)
                stack.callback(handle.remove)
        yield
