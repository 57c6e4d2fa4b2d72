"""Operations as the rules name them, and what K-FAC makes of them."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from curvature_callbacks.gram.capture.interception import Capture
from curvature_callbacks.gram.uses.operation import Operation, coverage_obstacle, factor_obstacle, is_layer_bias

N = 3
LINEAR, BIAS = Operation("linear", has_factors=True), Operation("bias", is_bias=True)
EMBEDDING = Operation("embedding", has_factors=True, transposed=True)


def operations_of(module: nn.Module, inputs: Tensor) -> dict[str, list[Operation]]:
    values = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
    capture = Capture(values, N, unruled={})
    with capture:
        functional_call(module, values, (inputs,))
    return dict(capture.operations)


@pytest.mark.parametrize(
    ("module", "inputs", "name", "transposed"),
    [
        (nn.Linear(4, 2), torch.randn(N, 5, 4), "linear", False),
        (Conv1D(2, 4), torch.randn(N, 5, 4), "transposed linear", True),
        (nn.Conv1d(4, 2, 3), torch.randn(N, 4, 6), "conv1d", False),
        (nn.Conv2d(4, 2, 3), torch.randn(N, 4, 6, 6), "conv2d", False),
        (nn.Conv3d(4, 2, 3), torch.randn(N, 4, 6, 6, 6), "conv3d", False),
        (nn.Embedding(7, 2), torch.randint(7, (N, 5)), "embedding", True),
    ],
)
def test_weights_of_layers_have_factors_and_say_how_they_are_stored(module: Any, inputs: Tensor, name: str, transposed: bool):
    found = operations_of(module, inputs)
    bias = "bias" if "bias" in dict(module.named_parameters()) else None
    assert found.pop("weight") == [Operation(name, has_factors=True, transposed=transposed, bias=bias)]
    assert found == ({"bias": [Operation("bias", is_bias=True, weights=("weight",))]} if bias else {})


@pytest.mark.parametrize(
    ("module", "inputs", "name"),
    [
        (nn.Conv2d(4, 2, 3, groups=2), torch.randn(N, 4, 6, 6), "grouped conv2d"),
        (nn.LayerNorm(4), torch.randn(N, 5, 4), "scale"),
        (nn.PReLU(4), torch.randn(N, 4), "scale"),
    ],
)
def test_what_has_no_factors_says_so(module: Any, inputs: Tensor, name: str):
    (operation,) = operations_of(module, inputs)["weight"]
    assert operation == Operation(name, bias="bias" if "conv" in name else None)
    assert factor_obstacle([operation]) == f"used by {name}, which has no Kronecker factors"


def test_a_part_of_a_weight_has_no_factors():
    class OnHalf(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight[:2])

    (operation,) = operations_of(OnHalf(4, 3, bias=False), torch.randn(N, 4))["weight"]
    assert operation == Operation("linear of a part of it")


class Layers(nn.Module):
    """One bias beside two weights, a bias beside a weight that is computed, and one whose weight is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.offset = nn.Parameter(torch.randn(4))
        self.normed = weight_norm(nn.Linear(4, 4))
        self.frozen = nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(nn.functional.linear(x, self.first, self.offset), self.second, self.offset)
        return self.frozen(self.normed(nn.functional.linear(hidden, self.first)))


def test_a_layer_says_which_bias_belongs_to_which_weight():
    model = Layers()
    found = operations_of(model, torch.randn(N, 4))
    linear, bias = partial(Operation, "linear", has_factors=True), partial(Operation, "bias", is_bias=True)
    of_function = Operation("linear of a function of it")
    parts = tuple(f"normed.parametrizations.weight.original{number}" for number in (0, 1))
    assert found == {
        "first": [linear(bias="offset"), linear()],
        "second": [linear(bias="offset")],
        "offset": [bias(weights=("first",)), bias(weights=("second",))],
        **{name: [of_function] for name in parts},
        "normed.bias": [bias(weights=parts)],
        "frozen.bias": [bias()],
    }


@pytest.mark.parametrize(
    ("operations", "reason"),
    [
        ({"bias": [Operation("bias", is_bias=True)]}, None),
        ({"bias": [Operation("bias", is_bias=True, weights=("w",))], "w": [LINEAR]}, None),
        ({"bias": [Operation("bias", is_bias=True, weights=("w",))], "w": [Operation("scale")]}, "bias of `w`, used by scale"),
        (
            {
                "bias": [Operation("bias", is_bias=True, weights=(w,)) for w in ("v", "w")],
                "v": [LINEAR],
                "w": [LINEAR, EMBEDDING],
            },
            "bias of `w`, shared between embedding and linear",
        ),
        ({"bias": [BIAS, Operation("shift")]}, "shared between bias and shift"),
        ({}, "not used by the loss"),
    ],
)
def test_a_bias_is_in_the_layers_of_its_weights(operations: dict[str, list[Operation]], reason: str | None):
    found = coverage_obstacle("bias", operations)
    assert found is None if reason is None else found is not None and found.startswith(reason)


@pytest.mark.parametrize("operation", [LINEAR, EMBEDDING])
def test_a_layer_that_runs_twice_has_factors(operation: Operation):
    assert factor_obstacle([operation, operation]) is None


@pytest.mark.parametrize(
    ("operations", "reason"),
    [
        ([], "not used"),
        ([LINEAR, EMBEDDING], "shared between embedding and linear"),
        ([Operation("grouped conv2d")], "used by grouped conv2d"),
        ([Operation("scale")], "no Kronecker factors"),
        ([BIAS], "no Kronecker factors"),
    ],
)
def test_what_has_no_factors_has_a_reason(operations: list[Operation], reason: str):
    assert reason in str(factor_obstacle(operations))


def test_a_bias_is_used_as_nothing_else():
    assert is_layer_bias([BIAS, BIAS])
    assert not is_layer_bias([])
    assert not is_layer_bias([BIAS, Operation("shift")])
    assert not is_layer_bias([BIAS.on("a part of it")])
