"""Normalisations of torch and of Hugging Face against the loop over rows."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.errors import RefusedError
from tests.gram.capture.rule_cases import RuleCase, T, assert_ruled, parameter_grams, weight

IMAGE = (4, 3, 2)

# what: (layer, shape of one row)
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "group_norm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "group_norm, one group": (lambda: nn.GroupNorm(1, 4), IMAGE),
    "group_norm, a group a channel": (lambda: nn.GroupNorm(4, 4), IMAGE),
    "group_norm of sequences": (lambda: nn.GroupNorm(2, 4), (4, T)),
    "group_norm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "group_norm of volumes": (lambda: nn.GroupNorm(2, 4), (4, 2, 3, 2)),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, T)),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "instance_norm2d, tracked": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
    "instance_norm3d": (lambda: nn.InstanceNorm3d(4, affine=True), (4, 2, 3, 2)),
    "layer_norm": (lambda: nn.LayerNorm(4), (T, 4)),
    "layer_norm of vectors": (lambda: nn.LayerNorm(4), (4,)),
    "layer_norm, no bias": (lambda: nn.LayerNorm(4, bias=False), (T, 4)),
    "layer_norm over all axes": (lambda: nn.LayerNorm(IMAGE), IMAGE),
    "layer_norm over two axes": (lambda: nn.LayerNorm((3, 2)), IMAGE),
    "rms_norm": (lambda: nn.RMSNorm(4), (T, 4)),
    "rms_norm with eps": (lambda: nn.RMSNorm(4, eps=0.3), (T, 4)),
    "rms_norm over two axes": (lambda: nn.RMSNorm((3, 2)), IMAGE),
    "batch_norm1d of vectors": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch_norm1d of sequences": (lambda: nn.BatchNorm1d(4), (4, T)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "batch_norm2d with eps": (lambda: nn.BatchNorm2d(4, eps=0.5, momentum=None), IMAGE),
    "batch_norm3d": (lambda: nn.BatchNorm3d(4), (4, 2, 3, 2)),
    "sync_batch_norm": (lambda: nn.SyncBatchNorm(4), IMAGE),
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", NORMS)
def test_norm_layers(name: str, stem: bool):
    layer, shape = NORMS[name]
    RuleCase(body=lambda m, x: m.layer(x), parts=lambda: {"layer": layer()}, shape=shape).assert_exact(stem=stem)


def test_running_statistics_are_not_at_their_start():
    """Else a rule that forgets them would pass."""
    model = RuleCase(body=lambda m, x: m.layer(x), parts=lambda: {"layer": nn.BatchNorm2d(4)}).model()
    assert (model.layer.running_mean.abs() > 0.01).all()
    assert ((model.layer.running_var - 1).abs() > 0.01).all()


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_statistics_of_the_batch_are_refused(layer: type[nn.Module], stem: bool):
    """Without running statistics BatchNorm couples the rows even in evaluation mode."""
    shape = IMAGE if layer is nn.BatchNorm2d else (4,)
    case = RuleCase(body=lambda m, x: m.layer(x), parts=lambda: {"layer": layer(4, track_running_stats=False)}, shape=shape)
    with pytest.raises(RefusedError):
        parameter_grams(case.model(stem=stem), case.microbatches((3, 4)))


def statistics(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.mean, m.var, m.weight, m.bias, eps=0.1)


def with_statistics() -> dict[str, Any]:
    return {"weight": weight(4), "bias": weight(4), "mean": nn.Buffer(torch.randn(4)), "var": nn.Buffer(torch.rand(4) + 0.5)}


def written_out(m: Any, x: Tensor) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    return m.weight * deviation / (deviation.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() + m.bias


FUNCTIONAL = {
    "layer_norm by keyword": RuleCase(
        body=lambda m, x: F.layer_norm(input=x, normalized_shape=(4,), bias=m.bias, weight=m.weight),
        parts=lambda: {"weight": weight(4), "bias": weight(4)},
    ),
    "layer_norm with a bias alone": RuleCase(
        body=lambda m, x: F.layer_norm(x, (4,), None, m.bias), parts=lambda: {"bias": weight(4)}
    ),
    "group_norm": RuleCase(
        body=lambda m, x: F.group_norm(x, 2, m.weight, m.bias, 0.1),
        parts=lambda: {"weight": weight(4), "bias": weight(4)},
        shape=IMAGE,
    ),
    "group_norm with a scale alone": RuleCase(
        body=lambda m, x: F.group_norm(x, 2, weight=m.weight), parts=lambda: {"weight": weight(4)}, shape=IMAGE
    ),
    "instance_norm": RuleCase(
        body=lambda m, x: F.instance_norm(x, weight=m.weight, bias=m.bias, eps=0.1),
        parts=lambda: {"weight": weight(4), "bias": weight(4)},
        shape=IMAGE,
    ),
    "batch_norm with running statistics": RuleCase(body=statistics, parts=with_statistics, shape=IMAGE),
    "rms_norm with 1 + weight": RuleCase(
        body=lambda m, x: F.rms_norm(x, (4,), 1.0 + m.weight, 0.1), parts=lambda: {"weight": weight(4)}
    ),
    "layer_norm with weight + 1": RuleCase(
        body=lambda m, x: F.layer_norm(x, (4,), m.weight + 1, m.bias),
        parts=lambda: {"weight": weight(4), "bias": weight(4)},
    ),
    "written out": RuleCase(body=written_out, parts=lambda: {"weight": weight(4), "bias": weight(4)}),
    "a norm of heads": RuleCase(
        body=lambda m, x: m.norm(x.unflatten(-1, (2, 2)).transpose(1, 2)), parts=lambda: {"norm": nn.RMSNorm(2)}
    ),
    "a scale for every head": RuleCase(
        body=lambda m, x: m.scale * F.layer_norm(x.unflatten(-1, (2, 2)), (2,)), parts=lambda: {"scale": weight(2, 2)}
    ),
    "positions on axis 0": RuleCase(
        body=lambda m, x: m.norm(x.flatten(0, 1)).reshape(x.shape), parts=lambda: {"norm": nn.LayerNorm(4)}
    ),
    "frames on axis 0": RuleCase(
        body=lambda m, x: m.norm(x.flatten(0, 1)).reshape(x.shape), parts=lambda: {"norm": nn.GroupNorm(2, 4)}, shape=(T, 4, 3)
    ),
    "frames on axis 0, running statistics": RuleCase(
        body=lambda m, x: m.norm(x.flatten(0, 1)).reshape(x.shape), parts=lambda: {"norm": nn.BatchNorm1d(4)}
    ),
    "shared": RuleCase(
        body=lambda m, x: m.norm(torch.tanh(m.norm(x))), parts=lambda: {"norm": nn.GroupNorm(2, 4)}, shape=IMAGE
    ),
    "shared running statistics": RuleCase(
        body=lambda m, x: m.norm(torch.tanh(m.norm(x))), parts=lambda: {"norm": nn.BatchNorm2d(4)}, shape=IMAGE
    ),
    "conditional scale and shift": RuleCase(
        body=lambda m, x: F.layer_norm(x, (4,)) * (1 + m.scale(x.mean(1)))[:, None] + m.shift(x.mean(1))[:, None],
        parts=lambda: {"scale": nn.Linear(4, 4), "shift": nn.Linear(4, 4)},
    ),
    "in-place activation": RuleCase(
        body=lambda m, x: m.norm(x).tanh_(), parts=lambda: {"norm": nn.BatchNorm2d(4)}, shape=IMAGE
    ),
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_norms_called_otherwise(name: str, stem: bool):
    FUNCTIONAL[name].assert_exact(stem=stem)


def test_a_layer_norm_before_the_samples_is_never_wrong():
    RuleCase(
        body=lambda m, x: m.norm(x.transpose(0, 1)).transpose(0, 1),
        parts=lambda: {"norm": nn.LayerNorm(4)},
        shape=(6, 4),
        by_row=...,
    ).assert_exact()


# model: (class, arguments, shape of one row); all compute in float32 whatever comes in.
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "llama": ("LlamaRMSNorm", {"hidden_size": 4}, (T, 4)),
    "gemma": ("GemmaRMSNorm", {"dim": 4}, (T, 4)),
    "gemma2": ("Gemma2RMSNorm", {"dim": 4}, (T, 4)),
    "gemma3": ("Gemma3RMSNorm", {"dim": 4}, (T, 4)),
    "qwen3": ("Qwen3RMSNorm", {"hidden_size": 4}, (2, T, 4)),
    "qwen3_next": ("Qwen3NextRMSNorm", {"dim": 4}, (T, 4)),
    "recurrent_gemma": ("RecurrentGemmaRMSNorm", {"dim": 4}, (T, 4)),
    "gpt_oss": ("GptOssRMSNorm", {"hidden_size": 4}, (T, 4)),
    "olmo2": ("Olmo2RMSNorm", {"hidden_size": 4}, (T, 4)),
    "mamba": ("MambaRMSNorm", {"hidden_size": 4}, (T, 4)),
    "t5": ("T5LayerNorm", {"hidden_size": 4}, (T, 4)),
    "deberta": ("DebertaLayerNorm", {"size": 4}, (T, 4)),
    "cohere": ("CohereLayerNorm", {"hidden_size": (2, 4)}, (T, 2, 4)),
    "chameleon": ("ChameleonLayerNorm", {"hidden_size": (2, 4)}, (T, 2, 4)),
    "nemotron": ("NemotronLayerNorm1P", {"normalized_shape": 4}, (T, 4)),
    "convnext": ("ConvNextLayerNorm", {"normalized_shape": 4, "data_format": "channels_first"}, IMAGE),
}
GATED = {
    "mamba2": ("MambaRMSNormGated", {"hidden_size": 4, "group_size": 2}),
    "qwen3_next": ("Qwen3NextRMSNormGated", {"hidden_size": 4}),
    "zamba2": ("Zamba2RMSNormGated", {"hidden_size": 4, "group_size": 2}),
}


def hugging_face(model: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    return getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)(**arguments)


def assert_exact_in_float32(case: RuleCase, stem: bool) -> None:
    assert_ruled(case.model(stem=stem), case.microbatches(), tolerance=1e-5)


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("model", HUGGING_FACE)
def test_norms_of_hugging_face(model: str, stem: bool):
    name, arguments, shape = HUGGING_FACE[model]
    make = partial(hugging_face, model, name, arguments)
    assert_exact_in_float32(RuleCase(body=lambda m, x: m.norm(x), parts=lambda: {"norm": make()}, shape=shape), stem)


@pytest.mark.parametrize("model", GATED)
def test_gated_norms_of_hugging_face(model: str):
    name, arguments = GATED[model]
    make = partial(hugging_face, model, name, arguments)
    case = RuleCase(body=lambda m, x: m.norm(x, m.gate(x)), parts=lambda: {"gate": nn.Linear(4, 4), "norm": make()})
    assert_exact_in_float32(case, stem=True)
