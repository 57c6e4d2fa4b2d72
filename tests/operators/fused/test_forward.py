"""Where fused layers are put into a forward pass, and where PyTorch's own are left."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.fused.forward import fused
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.graphs import graph_nodes
from curvature_callbacks.operators.hessian import HessianOperator
from tests.cases import CASES
from tests.reference import dense_hessian, relative_error

OWN = {"_LinearBackward", "_LayerNormBackward", "_PointwiseBackward", "_CrossEntropyBackward"}


def nodes(output: Tensor) -> set[str]:
    assert output.grad_fn is not None
    return {node.name() for node in graph_nodes([output.grad_fn])}


def outputs_of(model: nn.Module, *inputs: Tensor, curved: bool = True) -> Tensor:
    return fused(lambda: model(*inputs), list(model.modules()), curved=curved)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize(
    ("layer", "inputs", "node"),
    [
        (nn.Linear(4, 3), (2, 4), "_LinearBackward"),
        (nn.Linear(4, 3, bias=False), (2, 5, 4), "_LinearBackward"),
        (Conv1D(3, 4), (2, 5, 4), "_LinearBackward"),
        (nn.LayerNorm(4), (2, 5, 4), "_LayerNormBackward"),
        (nn.Sequential(nn.Linear(4, 3), nn.GELU()), (2, 4), "_PointwiseBackward"),
        (nn.Sequential(nn.Linear(4, 3), nn.SiLU()), (2, 4), "_PointwiseBackward"),
        (nn.Sequential(nn.Linear(4, 3), ACT2CLS["gelu_new"]()), (2, 4), "_PointwiseBackward"),
        (nn.Sequential(nn.Linear(4, 3), ACT2CLS["quick_gelu"]()), (2, 4), "_PointwiseBackward"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_layer_gets_its_own_node(layer: nn.Module, inputs: tuple[int, ...], node: str, curved: bool):
    layer = copy.deepcopy(layer).double()
    x = normal(*inputs)
    output = outputs_of(layer, x, curved=curved)
    assert torch.equal(output, layer(x))
    assert node in nodes(output)
    assert not nodes(layer(x)) & OWN


@pytest.mark.parametrize("name", ["gpt2", "vit", "bert", "llama"])
def test_no_composed_node_is_left_in_a_transformer(name: str):
    case = CASES[name]
    model = case.model().double().eval()
    inputs = dict(case.microbatches()[0])
    output = fused(lambda: model(**inputs).loss, list(model.modules()), curved=True)
    found = nodes(output)
    assert not found & {"AddmmBackward0", "NativeLayerNormBackward0", "GeluBackward0", "SiluBackward0", "TanhBackward0"}
    assert found & OWN


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_every_activation_that_is_replaced_is_pointwise(name: str):
    """By its Jacobian; one with parameters is left alone."""
    entry = ACT2CLS[name]
    cls, options = entry if isinstance(entry, tuple) else (entry, {})
    module = cls(**options).double()
    model = nn.Sequential(nn.Linear(4, 4).double(), module)
    x = normal(1, 4)
    replaced = "_PointwiseBackward" in nodes(outputs_of(model, x))
    if next(module.parameters(), None) is not None:
        assert not replaced
    if replaced:
        J = torch.autograd.functional.jacobian(module, normal(6))
        assert torch.equal(J, torch.diag(J.diagonal()))
    assert torch.equal(outputs_of(model, x), model(x))


def in_place(x: Tensor) -> Tensor:
    return F.silu(x * 1.0, inplace=True)


def in_autocast(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, weight)


class Wrapped(Tensor):
    """A tensor of a class of its own."""


LEFT: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "in place": (in_place, lambda: (normal(3).requires_grad_(),)),
    "one axis": (F.linear, lambda: (normal(4), normal(3, 4).requires_grad_())),
    "vector of weights": (F.linear, lambda: (normal(2, 4), normal(4).requires_grad_())),
    "scaled": (lambda *t: torch.addmm(*t, alpha=2), lambda: (normal(3), normal(2, 4), normal(4, 3).requires_grad_())),
    "a matrix added": (torch.addmm, lambda: (normal(2, 3), normal(2, 4), normal(4, 3).requires_grad_())),
    "broadcast": (torch.addmm, lambda: (normal(1), normal(2, 4), normal(4, 3).requires_grad_())),
    "a matrix of biases": (F.linear, lambda: (normal(2, 4), normal(3, 4).requires_grad_(), normal(2, 3).requires_grad_())),
    "sparse": (F.linear, lambda: (normal(2, 4).to_sparse(), normal(3, 4).requires_grad_())),
    "within autocast": (
        in_autocast,
        lambda: (normal(2, 4, dtype=torch.float32), normal(3, 4, dtype=torch.float32).requires_grad_()),
    ),
    "a class of its own": (F.linear, lambda: (normal(2, 4).as_subclass(Wrapped), normal(3, 4).requires_grad_())),
    "half precision": (F.gelu, lambda: (normal(3, dtype=torch.bfloat16).requires_grad_(),)),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_forms_are_left_to_pytorch(name: str):
    function, inputs = LEFT[name]
    tensors = inputs()
    with torch.autograd.graph.save_on_cpu():
        output = fused(lambda: function(*tensors), [], curved=True)
    assert not nodes(output) & OWN
    assert torch.equal(output, function(*tensors))


def test_arguments_by_name():
    x, weight, bias = normal(2, 4), normal(4, 3).requires_grad_(), normal(3)
    for function in (lambda: torch.addmm(bias, mat1=x, mat2=weight), lambda: F.linear(input=x, weight=weight.T, bias=bias)):
        output = fused(function, [], curved=True)
        assert "_LinearBackward" in nodes(output)
        assert torch.equal(output, function())


def second_derivatives(function: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(function().square().sum(), leaves, create_graph=True)
    again = torch.autograd.grad(
        found, leaves, [torch.ones_like(one) for one in found], allow_unused=True, materialize_grads=True
    )
    return [*found, *again]


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: F.relu(y, inplace=True),
    "sum": lambda y: y.add_(1.0),
    "mask": lambda y: y.masked_fill_(y > 0.5, 0.1),
    "write": lambda y: y.index_fill_(-1, torch.tensor([0]), 2.0),
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("last_layer", ["linear", "norm", "gelu", "identity"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3), (2, 2, 2, 3)])
def test_what_a_layer_gives_may_be_changed_in_place(shape: tuple[int, ...], last_layer: str, change: str):
    torch.manual_seed(0)
    last = {"linear": nn.Identity, "norm": lambda: nn.LayerNorm(3), "gelu": nn.GELU, "identity": ACT2CLS["linear"]}[
        last_layer
    ]()
    model = nn.Sequential(nn.Linear(3, 3), last).double()
    x, leaves = normal(*shape), list(model.parameters())
    plain = second_derivatives(lambda: IN_PLACE[change](model(x)), leaves)
    own = second_derivatives(lambda: fused(lambda: IN_PLACE[change](model(x)), list(model.modules()), curved=True), leaves)
    for mine, theirs in zip(own, plain, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (2, 0)])
def test_no_rows_or_no_features(shape: tuple[int, ...]):
    """An expert that no token was sent to."""
    model = nn.Sequential(nn.Linear(shape[-1], 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x, leaves = normal(*shape), list(model.parameters())
    own = second_derivatives(lambda: outputs_of(model, x), leaves)
    for mine, theirs in zip(own, second_derivatives(lambda: model(x), leaves), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_on_an_activation_see_and_change_its_output(everywhere: bool):
    model = nn.Sequential(nn.Linear(3, 4), ACT2CLS["gelu_new"](), nn.Linear(4, 2)).double()
    x = normal(5, 3)

    def mask(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return output * torch.tensor([1.0, 0.0, 2.0, 1.0]) if module is model[1] else None

    handle = (nn.modules.module.register_module_forward_hook if everywhere else model[1].register_forward_hook)(mask)
    try:
        leaves = list(model.parameters())
        expected, found = (second_derivatives(forward, leaves) for forward in (lambda: model(x), lambda: outputs_of(model, x)))
    finally:
        handle.remove()
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-12)


def test_without_gradients_nothing_is_replaced():
    layer = nn.Sequential(nn.Linear(4, 3), ACT2CLS["gelu_new"]()).double()
    with torch.no_grad():
        assert outputs_of(layer, normal(2, 4)).grad_fn is None
    assert not outputs_of(layer.requires_grad_(False), normal(2, 4)).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's own, of its forward mode
def test_transforms_and_forward_mode_inside_the_model_work():
    layer, x = nn.Linear(3, 3).double(), normal(2, 3)

    def by_transform() -> Tensor:
        total: Tensor = torch.func.vmap(torch.func.grad(lambda row: F.gelu(layer(row)).sum()))(x).sum()
        return total

    def by_forward_mode() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(F.gelu(layer(forward_ad.make_dual(x, x)))).tangent.sum()

    for function in (by_transform, by_forward_mode):
        found = torch.autograd.grad(fused(function, [layer], curved=True), layer.weight)[0]
        assert torch.allclose(found, torch.autograd.grad(function(), layer.weight)[0], rtol=1e-12)


class Energy(nn.Module):
    """Its output is the gradient of a network by its input, as of an energy; if taken `plainly`, that is a constant.

    Where it is `careful` it goes on without the gradient when that fails.
    """

    def __init__(self, *, plainly: bool = False, careful: bool = False) -> None:
        super().__init__()
        self.careful = careful
        self.net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1))  # third derivatives of a layer norm are wrong
        self.plainly = plainly

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            try:
                (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=not self.plainly)
            except Exception:
                if not self.careful:
                    raise
                slope = torch.zeros_like(x)
        return slope + self.net(x)


@pytest.mark.parametrize(("plainly", "careful"), [(False, False), (True, False), (False, True)])
def test_a_model_that_differentiates_itself_is_measured_rightly(plainly: bool, careful: bool):
    torch.manual_seed(0)
    model = Energy(plainly=plainly, careful=careful).double()
    batches = [(normal(5, 3), normal(5, 3) + 1)]

    def loss(m: nn.Module, rows: Any) -> Tensor:
        return F.mse_loss(m(rows[0]), rows[1])

    names = [name for name, _ in model.named_parameters()]
    expected = dense_hessian(model, lambda m: loss(m, batches[0]), names)
    with offline_problem(model, batches, loss="mse", params_filter=None) as problem:
        H = HessianOperator(problem.objective, problem.microbatches)
        G = GGNOperator(problem.objective, problem.microbatches)
        eye = torch.eye(H.shape[0], dtype=torch.float64)
        assert relative_error(H.matmat(eye), expected) < 1e-10
        outputs = model(batches[0][0]).flatten()
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        J = torch.stack(
            [torch.nn.utils.parameters_to_vector(torch.autograd.grad(z, model.parameters(), **options)) for z in outputs]
        )
        assert relative_error(G.matmat(eye), 2 / len(J) * J.T @ J) < 1e-10


def test_an_error_of_the_model_leaves_no_hook_behind():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = ACT2CLS["gelu_new"]()

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("of the model")

    model = Broken()
    with pytest.raises(ValueError, match="of the model"):
        outputs_of(model, normal(2))
    assert not model.act._forward_hooks
    working = nn.Sequential(nn.Linear(2, 2), ACT2CLS["gelu_new"]()).double()
    outputs_of(working, normal(3, 2))
    assert not working[1]._forward_hooks
    assert not nodes(working(normal(3, 2))) & OWN
