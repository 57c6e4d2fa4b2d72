"""Convolutions of every kind against the loop over rows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvature_callbacks.gram.capture.interception import Capture
from curvature_callbacks.gram.products.pixel_pairs import pair_gram, pairs_are_cheaper
from curvature_callbacks.gram.uses.convolution import Convolution, ConvolutionLimits
from tests.gram.capture.rule_cases import RuleCase, T, weight

# Torch says once that it pads a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPATIAL = {1: (9,), 2: (6, 5), 3: (4, 5, 4)}

# what: (dimensions, input channels, output channels, kernel, options)
CONVOLUTIONS: dict[str, tuple[int, int, int, Any, dict[str, Any]]] = {
    "conv1d": (1, 3, 4, 3, {}),
    "conv1d, no bias": (1, 3, 4, 3, {"bias": False}),
    "conv1d, stride": (1, 3, 4, 3, {"stride": 2}),
    "conv1d, stride leaves a rest": (1, 3, 4, 4, {"stride": 3}),
    "conv1d, padding": (1, 3, 4, 3, {"padding": 2}),
    "conv1d, same padding of an even kernel": (1, 3, 4, 4, {"padding": "same"}),
    "conv1d, same padding and dilation": (1, 3, 4, 4, {"padding": "same", "dilation": 2}),
    "conv1d, valid": (1, 3, 4, 3, {"padding": "valid"}),
    "conv1d, circular": (1, 3, 4, 3, {"padding": 2, "padding_mode": "circular"}),
    "conv1d, reflect": (1, 3, 4, 3, {"padding": 1, "padding_mode": "reflect"}),
    "conv1d, replicate and same": (1, 3, 4, 4, {"padding": "same", "padding_mode": "replicate"}),
    "conv1d, dilation": (1, 3, 4, 3, {"dilation": 3}),
    "conv1d, groups": (1, 4, 6, 3, {"groups": 2}),
    "conv1d, depthwise, causal padding": (1, 4, 4, 4, {"groups": 4, "padding": 3}),
    "conv1d, depthwise twice as wide": (1, 3, 6, 3, {"groups": 3}),
    "conv1d, kernel 1": (1, 3, 4, 1, {}),
    "conv1d, kernel as long as the input": (1, 3, 4, 9, {}),
    "conv1d, all at once": (1, 4, 6, 3, {"groups": 2, "stride": 2, "padding": 2, "dilation": 2, "bias": False}),
    "conv2d": (2, 2, 3, 3, {}),
    "conv2d, no bias": (2, 2, 3, 3, {"bias": False}),
    "conv2d, stride": (2, 2, 3, 3, {"stride": 2}),
    "conv2d, uneven stride and kernel": (2, 2, 3, (2, 3), {"stride": (3, 1)}),
    "conv2d, padding": (2, 2, 3, 3, {"padding": 1}),
    "conv2d, uneven padding": (2, 2, 3, 3, {"padding": (2, 0)}),
    "conv2d, same": (2, 2, 3, (4, 3), {"padding": "same"}),
    "conv2d, circular": (2, 2, 3, 3, {"padding": (1, 2), "padding_mode": "circular"}),
    "conv2d, reflect and stride": (2, 2, 3, 3, {"padding": 2, "padding_mode": "reflect", "stride": 2}),
    "conv2d, dilation": (2, 2, 3, 2, {"dilation": (2, 3)}),
    "conv2d, groups": (2, 4, 6, 3, {"groups": 2}),
    "conv2d, groups of one output": (2, 4, 2, 3, {"groups": 2}),
    "conv2d, depthwise": (2, 3, 3, 3, {"groups": 3, "padding": 1}),
    "conv2d, depthwise twice as wide": (2, 3, 6, 3, {"groups": 3, "bias": False}),
    "conv2d, kernel 1": (2, 2, 3, 1, {}),
    "conv2d, kernel 1 with stride": (2, 2, 3, 1, {"stride": 2, "bias": False}),
    "conv2d, patches": (2, 2, 3, 2, {"stride": 2}),
    "conv2d, kernel as large as the input": (2, 2, 3, (6, 5), {}),
    "conv2d, one output channel": (2, 2, 1, 3, {}),
    "conv2d, all at once": (2, 4, 6, (2, 3), {"groups": 2, "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    "conv3d": (3, 2, 3, 2, {}),
    "conv3d, stride and padding": (3, 2, 3, 3, {"stride": (1, 2, 1), "padding": (1, 0, 1)}),
    "conv3d, same": (3, 2, 3, (2, 3, 2), {"padding": "same", "bias": False}),
    "conv3d, circular": (3, 2, 3, 2, {"padding": 1, "padding_mode": "circular"}),
    "conv3d, groups and dilation": (3, 4, 2, 2, {"groups": 2, "dilation": (2, 1, 2)}),
    "conv3d, tubes": (3, 2, 3, (2, 5, 2), {"stride": (2, 5, 2)}),
}


def layer_case(name: str) -> RuleCase:
    dimensions, channels, outputs, kernel, options = CONVOLUTIONS[name]
    return RuleCase(
        body=lambda m, x: m.layer(x),
        parts=lambda: {"layer": LAYERS[dimensions](channels, outputs, kernel, **options)},
        shape=(channels, *SPATIAL[dimensions]),
    )


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_layers(name: str, stem: bool):
    layer_case(name).assert_exact(stem=stem)


def captured(name: str) -> tuple[list[Convolution], list[Tensor]]:
    """The uses of a layer's kernel by three microbatches, and the kernel's gradients, (N, P) each, one sample at a time."""
    layer = layer_case(name).model().layer
    uses, truth = [], []
    for x, _ in layer_case(name).microbatches():
        values = {key: parameter.detach() for key, parameter in layer.named_parameters()}
        arrived: dict[str, Any] = {}
        capture = Capture(values, len(x), unruled={})
        with capture:
            output = functional_call(layer, values, (x,))
        weights = torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)
        capture.backward((weights * torch.tanh(output)).sum(), arrived.__setitem__)
        ((placed,),) = [arrived["weight"]]
        uses.append(placed.use)
        losses = [(w * torch.tanh(layer(row[None])[0])).sum() for w, row in zip(weights, x, strict=True)]
        truth.append(torch.stack([torch.autograd.grad(loss, layer.weight)[0].flatten() for loss in losses]))
    return uses, truth


@pytest.mark.parametrize("step", [1, 1 << 24], ids=["sample by sample", "all samples"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_layers_by_patches(name: str, step: int):
    for use, expected in zip(*captured(name), strict=True):
        use.limits = ConvolutionLimits(max_grouped=0, patch_bytes=step)
        assert torch.allclose(use.slices(0, len(use.output_gradients[0])).flatten(1), expected)


@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if "group" not in name and "all at once" not in name])
def test_convolution_layers_by_pairs_of_pixels(name: str):
    uses, gradients = captured(name)
    if "groups" in CONVOLUTIONS[name][-1]:  # channels that never meet
        assert not pairs_are_cheaper(uses)
        return
    G = torch.cat(gradients)
    assert torch.allclose(pair_gram(uses), G @ G.T)


def test_rows_alone_in_their_microbatch():
    for name in ("conv1d, groups", "conv2d, stride", "conv3d"):
        layer_case(name).assert_exact(sizes=(1, 1, 1))


def frames(m: Any, x: Tensor) -> Tensor:
    """The frames of a clip as a batch of images: (N T, C, H, W), a sample's frames together."""
    hidden = torch.tanh(m.layer(x.flatten(0, 1)))
    return hidden.reshape(len(x), x.shape[1], -1)


def standardised(m: Any, x: Tensor) -> Tensor:
    """Weight standardisation, as in BiT."""
    mean, std = m.weight.mean((1, 2, 3), keepdim=True), m.weight.std((1, 2, 3), keepdim=True)
    return F.conv2d(x, (m.weight - mean) / (std + 1e-3), m.bias, padding=1)


FUNCTIONAL = {
    "raw weight": RuleCase(
        body=lambda m, x: F.conv2d(x, m.weight, m.bias, 2, 1),
        parts=lambda: {"weight": weight(3, 2, 3, 3), "bias": weight(3)},
        shape=(2, 6, 5),
    ),
    "keywords": RuleCase(
        body=lambda m, x: F.conv1d(input=x, weight=m.weight, bias=m.bias, groups=2, stride=2),
        parts=lambda: {"weight": weight(4, 1, 3), "bias": weight(4)},
        shape=(2, 9),
    ),
    "torch.conv3d": RuleCase(
        body=lambda m, x: torch.conv3d(x, m.weight, padding="same"),
        parts=lambda: {"weight": weight(2, 1, 3, 3, 2)},
        shape=(1, 3, 4, 4),
    ),
    "bias without the weight": RuleCase(
        body=lambda m, x: F.conv2d(x, torch.ones(3, 2, 2, 2, dtype=x.dtype), m.bias),
        parts=lambda: {"bias": weight(3)},
        shape=(2, 4, 4),
    ),
    "called twice": RuleCase(
        body=lambda m, x: m.layer(torch.tanh(m.layer(x))),
        parts=lambda: {"layer": nn.Conv2d(2, 2, 3, padding=1)},
        shape=(2, 5, 5),
    ),
    "called twice at different sizes": RuleCase(
        body=lambda m, x: torch.cat([m.layer(x).flatten(1), m.layer(F.avg_pool2d(x, 2)).flatten(1)], 1),
        parts=lambda: {"layer": nn.Conv2d(2, 3, 2, groups=1)},
        shape=(2, 6, 6),
    ),
    "grouped, called twice": RuleCase(
        body=lambda m, x: m.layer(torch.tanh(m.layer(x))),
        parts=lambda: {"layer": nn.Conv1d(4, 4, 3, padding=1, groups=2)},
        shape=(4, 7),
    ),
    "same weight at two dilations": RuleCase(
        body=lambda m, x: F.conv1d(x, m.weight, dilation=2)[..., :4] + F.conv1d(x, m.weight, padding=1)[..., :4],
        parts=lambda: {"weight": weight(3, 2, 3)},
        shape=(2, 8),
    ),
    "length differs between microbatches": RuleCase(
        body=lambda m, x: m.layer(x.mT)[..., : x.shape[1]], parts=lambda: {"layer": nn.Conv1d(4, 4, 4, padding=3, groups=4)}
    ),
    "frames on axis 0": RuleCase(body=frames, parts=lambda: {"layer": nn.Conv2d(2, 3, 2)}, shape=(T, 2, 4, 4)),
    "grouped frames on axis 0": RuleCase(
        body=frames, parts=lambda: {"layer": nn.Conv2d(2, 4, 2, groups=2)}, shape=(T, 2, 4, 4)
    ),
    "mamba's weight, unsqueezed": RuleCase(
        body=lambda m, x: F.conv1d(x.mT, m.layer.weight.squeeze(1).unsqueeze(1), m.layer.bias, padding=2, groups=4),
        parts=lambda: {"layer": nn.Conv1d(4, 4, 3, groups=4)},
    ),
    "standardised weight": RuleCase(
        body=standardised, parts=lambda: {"weight": weight(3, 2, 3, 3), "bias": weight(3)}, shape=(2, 5, 4)
    ),
    "masked weight": RuleCase(
        body=lambda m, x: F.conv2d(x, m.weight * torch.ones(3, 3, dtype=x.dtype).tril(), padding=1),
        parts=lambda: {"weight": weight(3, 2, 3, 3)},
        shape=(2, 5, 4),
    ),
    "a linear as a convolution": RuleCase(
        body=lambda m, x: F.conv1d(x.mT, m.linear.weight[:, :, None], m.linear.bias), parts=lambda: {"linear": nn.Linear(4, 3)}
    ),
    "in-place activation": RuleCase(
        body=lambda m, x: m.layer(x).tanh_(), parts=lambda: {"layer": nn.Conv2d(2, 3, 3)}, shape=(2, 5, 4)
    ),
    "channels last": RuleCase(
        body=lambda m, x: m.layer(x.contiguous(memory_format=torch.channels_last)),
        parts=lambda: {"layer": nn.Conv2d(2, 3, 3, padding=1)},
        shape=(2, 5, 4),
    ),
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_convolutions_called_otherwise(name: str, stem: bool):
    FUNCTIONAL[name].assert_exact(stem=stem)


# Exact, by a rule or row by row.
UNUSUAL = {
    "conv_transpose1d": RuleCase(
        body=lambda m, x: m.layer(x), parts=lambda: {"layer": nn.ConvTranspose1d(3, 2, 3, stride=2)}, shape=(3, 4), by_row=...
    ),
    "conv_transpose2d": RuleCase(
        body=lambda m, x: m.layer(x),
        parts=lambda: {"layer": nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2)},
        shape=(4, 3, 3),
        by_row=...,
    ),
    "weight tied with its transpose": RuleCase(
        body=lambda m, x: F.conv_transpose2d(torch.tanh(F.conv2d(x, m.weight)), m.weight),
        parts=lambda: {"weight": weight(3, 2, 3, 3)},
        shape=(2, 5, 5),
        by_row=...,
    ),
    # Three channels and three rows: axis 0 of every call is channels and passes for samples.
    "rows one after another": RuleCase(
        body=lambda m, x: torch.stack([m.layer(row) for row in x]),
        parts=lambda: {"layer": nn.Conv2d(3, 3, 3)},
        shape=(3, 5, 4),
        by_row=...,
    ),
    "samples as channels": RuleCase(
        body=lambda m, x: F.conv1d(
            x.transpose(0, 1), m.weight.expand(len(x), 1, 3), m.bias.expand(len(x)), groups=len(x)
        ).transpose(0, 1),
        parts=lambda: {"weight": weight(1, 1, 3), "bias": weight(1)},
        shape=(3, 7),
        by_row=...,
    ),
    "frames before samples": RuleCase(
        body=lambda m, x: m.layer(x.transpose(0, 1).flatten(0, 1)).reshape(x.shape[1], len(x), -1).transpose(0, 1),
        parts=lambda: {"layer": nn.Conv2d(2, 3, 2)},
        shape=(6, 2, 3, 3),
        by_row=...,
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_convolutions_are_never_wrong(name: str):
    UNUSUAL[name].assert_exact()
