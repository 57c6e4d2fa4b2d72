import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, Problem
from curvature_callbacks.model.objective import Objective
from tests.cases import CASES, CLASSES
from tests.families import family
from tests.reference import case_loss


def objective_of(name: str, model: nn.Module, **options: object) -> Objective:
    case = CASES[name]
    return Problem(model, case.microbatches(), loss=case.loss, **options).objective


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "mlp"])
def test_trainable_parameters_in_order_tied_ones_once(name: str):
    model = CASES[name].model()
    frozen = next(iter(dict(model.named_parameters())))
    dict(model.named_parameters())[frozen].requires_grad_(False)
    expected = [key for key, _ in model.named_parameters() if key != frozen]
    assert list(objective_of(name, model).parameters) == expected


@pytest.mark.parametrize("name", ["gpt2", "convnet"])
def test_values_stand_in_for_the_parameters(name: str):
    """The loss moves with the values given, and only with them."""
    case = CASES[name]
    model, batch = case.model(), case.microbatches()[0]
    objective = objective_of(name, model)
    moved = {key: value + 0.1 for key, value in objective.parameters.items()}
    replica = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter += 0.1
    expected = objective_of(name, replica)(batch).total
    assert torch.allclose(objective(batch, moved).total, expected)
    assert not torch.allclose(objective(batch).total, expected)


def test_leaves_share_memory_and_leave_no_gradient():
    model = CASES["gpt2"].model()
    objective = objective_of("gpt2", model)
    leaves = objective.leaves()
    objective(CASES["gpt2"].microbatches()[0], leaves).total.backward()
    for name, parameter in model.named_parameters():
        assert leaves[name].data_ptr() == parameter.data_ptr()
        assert parameter.grad is None
    assert leaves["transformer.wte.weight"].grad.abs().max() > 0


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_computed_in_float32_or_better(dtype: torch.dtype, computed: torch.dtype):
    model = CASES["mlp"].model(dtype)
    objective = objective_of("mlp", model)
    x, y = CASES["mlp"].microbatches()[0]
    total = objective((x.to(dtype), y)).total
    wide = copy.deepcopy(model).double()
    assert objective.dtype == total.dtype == computed
    assert torch.allclose(total.double(), F.cross_entropy(wide(x.to(dtype).double()), y, reduction="sum"), rtol=1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("frozen", [False, True])
def test_buffers_and_frozen_parameters_are_widened_with_the_rest(frozen: bool):
    model = CASES["convnet"].model(torch.bfloat16)
    model.conv1.requires_grad_(not frozen)
    objective = objective_of("convnet", model)
    x, y = CASES["convnet"].microbatches()[0]
    expected = F.cross_entropy(copy.deepcopy(model).double()(x.bfloat16().double()), y, reduction="sum")
    assert torch.allclose(objective((x.bfloat16(), y)).total.double(), expected, rtol=1e-5)


def test_a_partly_bfloat16_model():
    model = CASES["mlp"].model(torch.float32)
    model[0].to(torch.bfloat16)
    objective = objective_of("mlp", model)
    assert {value.dtype for value in objective.parameters.values()} == {torch.float32}
    assert objective(CASES["mlp"].microbatches()[0]).total.isfinite()


def test_nothing_trainable_is_a_configuration_error():
    model = CASES["mlp"].model().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="no trainable parameter"):
        objective_of("mlp", model)
    with pytest.raises(ConfigurationError, match="params_filter"):
        objective_of("mlp", CASES["mlp"].model(), params_filter=lambda name, parameter: False)


def test_no_microbatch_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="at least one microbatch"):
        Problem(family("gpt2"), [])


def test_an_embedding_that_rescales_itself_is_a_configuration_error():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, CLASSES))
    with pytest.raises(ConfigurationError, match="max_norm"):
        Problem(model, [(torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, dtype=torch.long))], loss="cross_entropy")


def test_gradients_are_those_of_the_mean_over_targets():
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    gradients = Problem(model, microbatches).gradients
    loss = case_loss(case, microbatches)
    replica = copy.deepcopy(model)
    loss(replica).backward()
    for name, parameter in replica.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6 * parameter.grad.abs().max().item())
