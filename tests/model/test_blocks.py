"""Blocks of plain models, and what holds whatever the structure is."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from curvature_callbacks import ConfigurationError, CurvatureMonitor, compute_fisher_spectrum
from curvature_callbacks.model.blocks import group_blocks
from curvature_callbacks.probes import CapturedProbes
from curvature_callbacks.record import tag_segment
from tests.cases import CASES, ConvNet
from tests.families import family
from tests.model.block_cases import EARLY, assert_partition, component_names, trainable


class Plain(nn.Module):
    """Lists in lists, a raw parameter beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1))
        self.stem = nn.Linear(2, 2)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
        self.experts = nn.ModuleList([nn.Linear(2, 2)])


class Bottleneck(nn.Module):
    """The block of torchvision's ResNet-50, by attribute names."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))


class ResNet(nn.Module):
    """torchvision's ResNet by attribute names: stem, four stages of two bottlenecks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, bias=False), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)
        self.layer1 = nn.Sequential(Bottleneck(4, 2, 1), Bottleneck(8, 2, 1))
        self.layer2 = nn.Sequential(Bottleneck(8, 3, 2), Bottleneck(12, 3, 1))
        self.layer3 = nn.Sequential(Bottleneck(12, 4, 2), Bottleneck(16, 4, 1))
        self.layer4 = nn.Sequential(Bottleneck(16, 5, 2), Bottleneck(20, 5, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(20, 3)


class LeNet(nn.Module):
    """No list at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)


class ListedHead(nn.Module):
    """The only list is the head: what is before it is no stem."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)
        self.classifier = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class OnlyLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def vgg() -> nn.Module:
    features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3))
    classifier = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout(), nn.Linear(2, 3))
    return nn.ModuleDict({"features": features, "classifier": classifier})


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))),
        nn.Sequential(nn.Linear(2, 2)),
        nn.Linear(2, 2),
    )


STAGES = {f"layer{stage}.{block}": "conv norm" for stage in (1, 2, 3, 4) for block in (0, 1)}
PLAIN: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "small_resnet": (
        ConvNet(),
        {"conv1": "embedding", "bn1": "norm", "layer1.0": "conv norm", "layer1.1": "conv norm", "fc": "head"},
    ),
    "resnet": (ResNet(), {"conv1": "embedding", "bn1": "norm", **STAGES, "fc": "head"}),
    "vgg": (
        vgg(),
        {"features.0": "conv", "features.1": "norm", "features.3": "conv", "classifier.0": "head", "classifier.3": "head"},
    ),
    "lenet": (LeNet(), {"conv1": "conv", "conv2": "conv", "fc1": "mlp", "fc2": "head"}),
    "listed_head": (ListedHead(), {"conv1": "conv", "conv2": "conv", "classifier.0": "head", "classifier.2": "head"}),
    "plain": (
        Plain(),
        {"scale": "embedding", "stem": "embedding", "body.0": "mlp", "body.2": "mlp", "experts.0": "mlp"},
    ),
    "sequential": (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), {"0": "mlp", "2": "head"}),
    "nested": (nested(), {"0": "mlp norm", "1": "mlp", "2": "head"}),
    "only_layers": (OnlyLayers(), {"layers.0": "mlp", "layers.1": "head"}),
    "one_layer": (nn.Linear(2, 2), {"weight": "mlp", "bias": "mlp"}),
    "torch_transformer": (
        CASES["encoder"].build(),
        {
            "positions": "embedding",
            "encoder.layers.0": "attention mlp norm",
            "encoder.layers.1": "attention mlp norm",
            "head": "head",
        },
    ),
    "torch_encoder_decoder": (
        nn.Transformer(4, 2, 2, 2, 6, batch_first=True),
        {
            **{f"encoder.layers.{i}": "attention mlp norm" for i in (0, 1)},
            "encoder.norm": "norm",
            **{f"decoder.layers.{i}": "attention mlp norm" for i in (0, 1)},
            "decoder.norm": "norm",
        },
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_blocks_of_plain_models(name: str):
    model, expected = PLAIN[name]
    layers = group_blocks(model, trainable(model))
    assert list(layers) == list(expected)
    assert_partition(layers, trainable(model))
    parts = group_blocks(model, trainable(model), "component")
    assert list(parts) == component_names(expected)
    assert_partition(parts, trainable(model))


def test_layers_are_padded_so_that_they_sort():
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])
    for structure in ("layer", "component"):
        tags = [tag_segment(block) for block in group_blocks(model, trainable(model), structure)]
        assert tags == sorted(tags)


def test_an_unknown_structure_is_named():
    every = "`block_structure` must be one of 'layer', 'component', 'module', 'parameter', 'none', a mapping"
    for wrong in ("layers", 3, None, ["layer"]):
        with pytest.raises(ConfigurationError, match=every):
            group_blocks(nn.Linear(2, 2), ["weight"], wrong)


def test_blocks_no_logger_could_tell_apart_are_refused():
    model = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a-b": nn.Linear(2, 2)})
    with pytest.raises(ConfigurationError, match="same tag"):
        group_blocks(model, trainable(model))


@pytest.mark.parametrize(
    ("structure", "match"),
    [({"a": ["nowhere"]}, "names 'nowhere'"), (lambda name, parameter: 3, "must name blocks")],
    ids=["mapping", "function"],
)
def test_blocks_are_checked_before_there_is_data(structure: Any, match: str):
    """Probes that only watch the loop have no batch yet."""
    probes = CapturedProbes(num_microbatches=1, microbatch_size=2)
    monitor = CurvatureMonitor(nn.Linear(2, 2), probes=probes, loss="mse", block_structure=structure)
    with pytest.raises(ConfigurationError, match=match):
        monitor.check()


def test_blocks_are_checked_for_what_is_measured_only():
    probes = CapturedProbes(num_microbatches=1, microbatch_size=2)
    asked: list[str] = []
    monitor = CurvatureMonitor(
        nn.Linear(2, 2),
        probes=probes,
        loss="mse",
        params_filter=lambda name, parameter: name == "bias",
        block_structure=lambda name, parameter: asked.append(name),
    )
    monitor.check()
    assert asked == ["bias"]


@pytest.mark.parametrize("structure", ["component", "module", {"first": ["0"]}, lambda name, parameter: name[0]])
def test_spectra_of_every_structure_are_those_of_one_fisher(structure: Any):
    model = CASES["mlp"].model()
    batch = CASES["mlp"].microbatches((6,))[0]
    blocks = group_blocks(model, trainable(model), structure)
    spectra = compute_fisher_spectrum(model, batch, loss="cross_entropy", block_structure=structure)
    whole = compute_fisher_spectrum(model, batch, loss="cross_entropy", block_structure="none")
    assert list(spectra.blocks) == list(blocks)
    torch.testing.assert_close(spectra.full.eigenvalues, whole.full.eigenvalues)


def test_structures_survive_json():
    """LightningCLI builds callbacks from YAML."""
    model = family("gpt2")
    for structure in (EARLY, "component"):
        again = json.loads(json.dumps(structure))
        assert group_blocks(model, trainable(model), again) == group_blocks(model, trainable(model), structure)
