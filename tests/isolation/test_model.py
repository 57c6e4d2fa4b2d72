"""Whatever happens inside `isolated`, everything its docstring lists is as it was afterwards, also after an exception."""

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from curvature_callbacks.isolation import model as isolation
from curvature_callbacks.isolation.model import isolated
from tests.families import family
from tests.training_cases import assert_equal, global_generators, seed_everything


class Interruption(BaseException):
    """As a KeyboardInterrupt: not an `Exception`."""


@contextmanager
def isolated_section(model: nn.Module, ending: type[BaseException] | None, seed: int = 3) -> Iterator[None]:
    """An isolated section that ends as told."""
    with nullcontext() if ending is None else pytest.raises(ending), isolated(model, seed=seed):
        yield
        if ending is not None:
            raise ending


endings = pytest.mark.parametrize("ending", [None, RuntimeError, Interruption], ids=["return", "exception", "interrupt"])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


@endings
def test_global_generators(ending: Any) -> None:
    model = network()
    seed_everything(11)
    before = global_generators()
    with isolated_section(model, ending):
        torch.rand(3), np.random.rand(3), random.random()
        torch.manual_seed(0)
    assert_equal(before, global_generators())


@endings
def test_generators_go_on_as_if_nothing_had_been_drawn(ending: Any) -> None:
    model = network()
    seed_everything(5)
    expected = (torch.rand(4).tolist(), np.random.rand(4).tolist(), [random.random() for _ in range(4)])
    seed_everything(5)
    with isolated_section(model, ending):
        torch.rand(3), np.random.rand(3), random.random()
    assert (torch.rand(4).tolist(), np.random.rand(4).tolist(), [random.random() for _ in range(4)]) == expected


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_the_generator_of_the_models_accelerator(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins for those of two devices, of which the second is the current one."""
    other, own = (torch.Generator().manual_seed(number) for number in (1, 2))
    monkeypatch.setattr(torch.cuda, "default_generators", (other, own))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    before = [generator.get_state() for generator in (other, own)]
    with isolation._generators(torch.device(device), 7):
        assert own.initial_seed() == 7
        assert other.initial_seed() == 1
        torch.rand(3, generator=own)
    assert_equal(before, [generator.get_state() for generator in (other, own)])


def test_the_seed_determines_every_draw_inside() -> None:
    def draws(seed: int) -> tuple[Any, ...]:
        with isolated(model, seed=seed):
            return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    model = network()
    assert draws(3) == draws(3)
    assert all(one != other for one, other in zip(draws(3), draws(4), strict=True))
    draws(2**63 - 1)  # the largest seed `stable_seed` gives


@endings
def test_training_flags_of_every_submodule(ending: Any) -> None:
    model = network().train()
    model[1].eval()
    with isolated_section(model, ending):
        assert not any(module.training for module in model.modules())
        model.train()
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


@endings
def test_content_of_buffers(ending: Any) -> None:
    model = network().train()
    model[1](torch.randn(8, 4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with isolated_section(model, ending):
        model.train()
        model(torch.randn(8, 4))
        model[1].running_mean.fill_(torch.nan)
    assert_equal(before, dict(model.named_buffers()))


@endings
def test_identity_and_order_of_buffers(ending: Any) -> None:
    model = network()
    model[1].register_buffer("optional", None)
    model[0].register_buffer("cache", torch.ones(2), persistent=False)
    before = {name: id(buffer) for module in model.modules() for name, buffer in module._buffers.items()}
    with isolated_section(model, ending):
        model[1].running_mean = torch.zeros(4)
        model[1].optional = torch.ones(1)
        model[0].cache = torch.zeros(5)
        model[3].register_buffer("surprise", torch.ones(1))
        del model[1].num_batches_tracked
    after = {name: id(buffer) for module in model.modules() for name, buffer in module._buffers.items()}
    assert list(before.items()) == list(after.items())
    assert_equal(model[0].cache, torch.ones(2))


def test_unchanged_buffers_are_not_written_to() -> None:
    model = network()
    version = model[1].running_mean._version
    with isolated(model, seed=0):
        model(torch.randn(2, 4))
    assert model[1].running_mean._version == version


@endings
def test_forward_that_accelerate_patched(ending: Any) -> None:
    model, patched_child = network(), 3
    for module in (model, model[patched_child]):
        original = module.forward
        module.__dict__["_original_forward"] = original
        module.forward = functools.partial(lambda inner, *args: inner(*args) + 1000, original)
    patches = [module.__dict__["forward"] for module in (model, model[patched_child])]
    with isolated_section(model, ending):
        assert model(torch.zeros(2, 4)).abs().max() < 100
    assert [module.__dict__["forward"] for module in (model, model[patched_child])] == patches
    assert model(torch.zeros(2, 4)).min() > 1000


def test_a_forward_the_user_replaced_is_the_one_measured() -> None:
    model = network()
    model.forward = lambda x: x + 7  # type: ignore[method-assign]
    with isolated(model, seed=0):
        assert model(torch.zeros(1)).item() == 7


SDPA_FLAGS = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)


@endings
@pytest.mark.parametrize("surrounding", [None, SDPBackend.FLASH_ATTENTION], ids=["default", "flash"])
def test_attention_backend(surrounding: Any, ending: Any) -> None:
    with nullcontext() if surrounding is None else sdpa_kernel(surrounding):
        before = [flag() for flag in SDPA_FLAGS]
        with isolated_section(network(), ending):
            assert [flag() for flag in SDPA_FLAGS] == [False, False, True, False]
        assert [flag() for flag in SDPA_FLAGS] == before


def test_attention_can_be_differentiated_twice_inside() -> None:
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    with isolated(network(), seed=0):
        total = nn.functional.scaled_dot_product_attention(q, q, q).sum()
    (gradient,) = torch.autograd.grad(total, q, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), q)
    assert second.abs().sum() > 0


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@endings
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.usefixtures("matmul_precision")
def test_matmul_precision(precision: str, ending: Any) -> None:
    torch.set_float32_matmul_precision(precision)
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv]
    before = [backend.fp32_precision for backend in backends]
    with isolated_section(network(), ending):
        assert [backend.fp32_precision for backend in backends] == ["ieee"] * 3
    assert torch.get_float32_matmul_precision() == precision  # raises when the old and the new switch disagree
    assert [backend.fp32_precision for backend in backends] == before


@endings
@pytest.mark.parametrize("allowed", [False, True])
def test_models_may_set_cudnns_own_flags_inside(allowed: bool, ending: Any) -> None:
    """As Wav2Vec2 does around its CTC loss: they read the old switch, which is an error where it differs from the new ones."""
    cudnn = torch.backends.cudnn
    found = cudnn.allow_tf32
    cudnn.allow_tf32 = allowed
    try:
        before = [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.fp32_precision]
        with isolated_section(network(), ending):
            with cudnn.flags(enabled=False):
                pass
            assert not cudnn.allow_tf32
            assert "tf32" not in (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
        assert cudnn.allow_tf32 == allowed
        assert [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.fp32_precision] == before
    finally:
        cudnn.allow_tf32 = found


@endings
def test_settings_that_make_the_old_switch_an_error_are_kept(ending: Any) -> None:
    cudnn = torch.backends.cudnn
    found = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee" if found == "tf32" else "tf32"
    try:
        before = [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]
        with isolated_section(network(), ending):
            assert [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision] == ["ieee", "ieee"]
        assert [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision] == before
    finally:
        cudnn.conv.fp32_precision = found


@endings
def test_autocast_grad_mode_and_inference_mode(ending: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with isolated_section(network(), ending):
            assert not torch.is_autocast_enabled("cpu")
            assert torch.is_grad_enabled()
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        with isolated_section(network(), ending):
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()


@endings
def test_compiled_functions_run_eagerly_inside_and_compiled_outside(ending: Any) -> None:
    compiled_calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled_calls.append(1)
        return graph.forward

    model = network()
    function = torch.compile(lambda x: model(x).sum(), backend=backend)
    with isolated_section(model, ending):
        function(torch.zeros(2, 4))
    assert not compiled_calls
    function(torch.zeros(2, 4))
    assert compiled_calls


@endings
def test_parameters_gradients_and_hooks_are_not_touched(ending: Any) -> None:
    model = network()
    model(torch.randn(3, 4)).sum().backward()
    model[0].register_forward_hook(lambda *_: None)
    identities = [(id(parameter), parameter._version, id(parameter.grad)) for parameter in model.parameters()]
    with isolated_section(model, ending):
        model(torch.randn(3, 4))
    assert [(id(parameter), parameter._version, id(parameter.grad)) for parameter in model.parameters()] == identities
    assert len(model[0]._forward_hooks) == 1


def test_sections_may_be_nested() -> None:
    model = network()
    model[1].eval()
    seed_everything(2)
    before = global_generators()
    with isolated(model, seed=0), isolated(model, seed=1):
        torch.rand(1)
    assert_equal(before, global_generators())
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_a_model_without_parameters() -> None:
    with isolated(nn.Identity(), seed=0):
        assert torch.is_grad_enabled()


@endings
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_functions_are_plain_calls_inside_and_checkpointed_outside(ending: Any, use_reentrant: bool) -> None:
    """One that was imported by its name follows too."""
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    calls: list[int] = []

    def function(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return layer(value).tanh()

    with isolated_section(layer, ending):
        output = checkpoint(function, x, use_reentrant=use_reentrant)
        torch.autograd.grad(output.sum(), x)
        assert len(calls) == 1
    calls.clear()
    checkpoint(function, x, use_reentrant=use_reentrant).sum().backward()
    assert len(calls) == 2


@endings
def test_experts_run_one_by_one_inside(ending: Any) -> None:
    model = family("mixtral")
    model.config._experts_implementation = "grouped_mm"
    with isolated_section(model, ending):
        assert model.config._experts_implementation == "eager"
        assert all(module.config._experts_implementation == "eager" for module in model.modules() if hasattr(module, "config"))
    assert model.config._experts_implementation == "grouped_mm"
