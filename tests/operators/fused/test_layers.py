"""Every fused layer against PyTorch's own composition of the same function, in float64: values, gradients, changes of these."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks.operators.fused.linear import linear
from curvature_callbacks.operators.fused.norm import layer_norm
from curvature_callbacks.operators.fused.order import DifferentiatesItselfError, Order
from curvature_callbacks.operators.fused.pointwise import pointwise


@dataclass(frozen=True)
class Layer:
    """One layer: ours, PyTorch's, and the shapes of input, weight and bias (None: without)."""

    own: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...] | None, ...]


def norm(*shape: int, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return (
        lambda order, x, c=None, b=None: layer_norm(order, x, shape, c, b, **options),
        lambda x, c=None, b=None: F.layer_norm(x, shape, c, b, **options),
    )


def function(f: Callable[[Tensor], Tensor]) -> Layer:
    return Layer(lambda order, x: pointwise(order, x, f), f, ((2, 5, 3),))


def gelu_by_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


LAYERS = {
    "linear": Layer(linear, F.linear, ((4, 3), (5, 3), (5,))),
    "linear without bias": Layer(linear, F.linear, ((4, 3), (5, 3), None)),
    "linear of sequences": Layer(linear, F.linear, ((2, 4, 3), (5, 3), (5,))),
    "linear of images": Layer(linear, F.linear, ((2, 2, 2, 3), (5, 3), None)),
    "linear of one output": Layer(linear, F.linear, ((4, 3), (1, 3), (1,))),
    "norm": Layer(*norm(4), ((3, 4), (4,), (4,))),
    "norm of sequences": Layer(*norm(4, eps=0.3), ((2, 3, 4), (4,), (4,))),
    "norm without bias": Layer(*norm(4), ((2, 3, 4), (4,), None)),
    "norm without scale": Layer(*norm(4), ((2, 3, 4), None, None)),
    "norm over two axes": Layer(*norm(3, 4), ((2, 3, 4), (3, 4), (3, 4))),
    "gelu": function(F.gelu),
    "gelu by tanh": function(gelu_by_tanh),
    "square": function(torch.square),
    "relu": function(F.relu),
    "double": function(lambda x: 2 * x),
}
SUBSETS = ((0, 1, 2), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2))  # what requires a gradient


def inputs_of(layer: Layer, wanted: Sequence[int]) -> tuple[list[Tensor | None], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    values = [
        None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64) + (place == 1)
        for place, shape in enumerate(layer.shapes)
    ]
    leaves = [value.requires_grad_() for place, value in enumerate(values) if value is not None and place in wanted]
    return values, leaves


def like(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in tensors]


def changes(run: Callable[..., Tensor], layer: Layer, wanted: Sequence[int]) -> list[Tensor]:
    """Value, gradients, `J v`, and the derivative of `<gradients, v>` by inputs and by what comes from above."""
    values, leaves = inputs_of(layer, wanted)
    output = run(*values)
    (g,) = like([output], 1)
    g.requires_grad_()
    found = torch.autograd.grad(output, leaves, g, create_graph=True)
    v = like(leaves, 2)
    by_g = torch.autograd.grad(found, g, v, retain_graph=True)
    by_leaves = torch.autograd.grad(found, leaves, v, retain_graph=True, allow_unused=True, materialize_grads=True)
    again = torch.autograd.grad(output, leaves, g.detach(), retain_graph=True)
    assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))
    return [output, *found, *by_g, *by_leaves]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        pytest.param(name, wanted, id=f"{name}-{wanted}")
        for name, layer in LAYERS.items()
        for wanted in SUBSETS
        if all(place < len(layer.shapes) and layer.shapes[place] is not None for place in wanted)
    ],
)
def test_derivatives_are_those_of_pytorch(name: str, wanted: tuple[int, ...]):
    layer = LAYERS[name]
    order = Order(curved=True)

    def own(*values: Tensor) -> Tensor:
        result = layer.own(order, *values)
        order.is_forward = False
        return result

    for mine, theirs in zip(changes(own, layer, wanted), changes(layer.plain, layer, wanted), strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_products_with_the_jacobian_need_no_curvature(name: str):
    """Then the derivative by what comes from above is there, and none by the inputs."""
    layer = LAYERS[name]
    results = []
    for own in (True, False):
        order = Order(curved=False)
        values, leaves = inputs_of(layer, (0, 1, 2))
        output = layer.own(order, *values) if own else layer.plain(*values)
        order.is_forward = False
        dummy = torch.zeros((), dtype=torch.float64).expand(output.shape).requires_grad_()
        found = torch.autograd.grad(output, leaves, dummy, create_graph=True)
        if own:
            assert not any(
                one is not None for one in torch.autograd.grad(found, leaves, like(leaves, 2), True, allow_unused=True)
            )
        results.append(torch.autograd.grad(found, dummy, like(leaves, 2))[0])
    assert torch.allclose(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_only_one_of_the_changes(name: str):
    """Of the gradient by the input, by the weight or by the bias alone."""
    layer = LAYERS[name]
    for place in range(len(inputs_of(layer, (0, 1, 2))[1])):
        results = []
        for own in (True, False):
            order = Order(curved=True)
            values, leaves = inputs_of(layer, (0, 1, 2))
            output = layer.own(order, *values) if own else layer.plain(*values)
            order.is_forward = False
            (g,) = like([output], 1)
            g.requires_grad_()
            found = torch.autograd.grad(output, leaves, g, create_graph=True)[place]
            (v,) = like([found], 2)
            results.append(torch.autograd.grad(found, [g, *leaves], v, allow_unused=True, materialize_grads=True))
        for mine, theirs in zip(*results, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("name", ["linear", "norm", "gelu"])
def test_a_derivative_within_the_forward_pass_is_refused_if_it_will_be_differentiated(name: str, curved: bool):
    layer = LAYERS[name]
    values, leaves = inputs_of(layer, (0, 1, 2))
    output = layer.own(Order(curved=curved), *values)
    torch.autograd.grad(output.sum(), leaves, retain_graph=True)  # a constant
    with pytest.raises(DifferentiatesItselfError):
        torch.autograd.grad(output.sum(), leaves, create_graph=True)


@pytest.mark.parametrize("name", ["linear", "norm", "gelu"])
def test_a_third_derivative_is_an_error(name: str):
    layer = LAYERS[name]
    order = Order(curved=True)
    values, leaves = inputs_of(layer, (0, 1, 2))
    output = layer.own(order, *values)
    order.is_forward = False
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(sum(one.square().sum() for one in first), leaves, create_graph=True)


def test_a_graph_for_jacobian_products_holds_nothing_from_above():
    """Which would be as large as the activations again."""
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    for name in ("linear of sequences", "norm of sequences", "gelu"):
        layer = LAYERS[name]
        order = Order(curved=False)
        values, leaves = inputs_of(layer, (0, 1, 2))
        output = layer.own(order, *values)
        order.is_forward = False
        (g,) = like([output], 1)
        g.requires_grad_()
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.autograd.grad(output, leaves, g, create_graph=True)
        assert held, name
        assert all(tensor.data_ptr() != g.data_ptr() for tensor in held), name
