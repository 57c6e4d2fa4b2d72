"""Operations as the rules name them, and what K-FAC makes of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from curvature_callbacks.gram.capture.interception import Capture
from curvature_callbacks.gram.uses.operation import Operation, factor_obstacle, is_layer_bias

N = 3
LINEAR, BIAS = Operation("linear", has_factors=True), Operation("bias", is_bias=True)
EMBEDDING = Operation("embedding", has_factors=True, transposed=True)


def operations_of(module: nn.Module, inputs: Tensor) -> dict[str, list[Operation]]:
    values = {name: parameter.detach() for name, parameter in module.named_parameters()}
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
    assert found.pop("weight") == [Operation(name, has_factors=True, transposed=transposed)]
    assert list(found.values()) == [[BIAS]] * ("bias" in dict(module.named_parameters()))


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
    assert operation == Operation(name)
    assert factor_obstacle([operation]) == f"used by {name}, which has no Kronecker factors"


def test_a_part_of_a_weight_has_no_factors():
    class OnHalf(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight[:2])

    (operation,) = operations_of(OnHalf(4, 3, bias=False), torch.randn(N, 4))["weight"]
    assert operation == Operation("linear of a part of it")


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
