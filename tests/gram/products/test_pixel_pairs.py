"""Grams of convolution kernels from products of pixels, against kernel gradients written out one sample at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks.gram.capture.derived import Placed, View
from curvature_callbacks.gram.products.factored import factored_gram
from curvature_callbacks.gram.products.limits import PRODUCT_LIMITS, ProductLimits
from curvature_callbacks.gram.products.parameter_gram import parameter_gram
from curvature_callbacks.gram.products.pixel_pairs import pair_gram, pairs_are_cheaper
from curvature_callbacks.gram.products.scratch import Scratch
from curvature_callbacks.gram.uses.convolution import Convolution, Geometry
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout

CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
WIDE = (24, 20)  # channels in and out, on few positions: there pairs are cheaper


def geometry(n: int = 2, *, kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1, groups: int = 1) -> Geometry:
    return Geometry(kernel=(kernel,) * n, stride=(stride,) * n, padding=(padding,) * n, dilation=(dilation,) * n, groups=groups)


def drawn(N: int, size: tuple[int, ...], form: Geometry, *, seed: int = 0, channels: tuple[int, int] = WIDE) -> Convolution:
    """A use with random input and output gradient."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(N, channels[0], *size, generator=generator, dtype=torch.float64)
    weight = torch.zeros(channels[1], channels[0] // form.groups, *form.kernel, dtype=torch.float64)
    output = CONVOLVE[len(size)](inputs, weight, None, form.stride, form.padding, form.dilation, form.groups)
    use = Convolution(Operation("conv"), N, inputs, form)
    use.complete(torch.randn(output.shape, generator=generator, dtype=torch.float64))
    return use


def written_out(use: Convolution) -> Tensor:
    """(N, P) kernel gradients by autograd, one sample at a time."""
    form, rows = use.geometry, []
    for inputs, outputs in zip(use.inputs, use.output_gradients, strict=True):
        weight = torch.zeros(len(outputs), len(inputs), *form.kernel, dtype=torch.float64, requires_grad=True)
        made = CONVOLVE[len(form.kernel)](inputs[None], weight, None, form.stride, form.padding, form.dilation)
        rows.append(torch.autograd.grad((made[0] * outputs).sum(), weight)[0].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((3, 2), {}),
        ((4,), {}),
        ((2, 2, 2), {}),
        ((5, 4), {"stride": 2}),
        ((4, 4), {"stride": 3, "padding": 2}),
        ((3, 3), {"padding": 0}),
        ((3, 3), {"kernel": 2, "dilation": 2, "padding": 2}),
        ((2, 3), {"kernel": 5, "padding": 2}),
        ((1, 1), {"padding": 3}),
    ],
    ids=str,
)
def test_every_geometry(size: tuple[int, ...], options: dict[str, int]):
    use = drawn(5, size, geometry(len(size), **options))
    G = written_out(use)
    found = pair_gram([use])
    assert found.dtype == torch.float64
    assert torch.allclose(found, G @ G.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("pixel_bytes", [PRODUCT_LIMITS.pixel_bytes, 37 * 16 * 8 * 3], ids=["by quarters", "three samples"])
def test_tiles_of_samples_are_mirrored(pixel_bytes: int):
    use = drawn(37, (2, 2), geometry())
    G = written_out(use)
    found = pair_gram([use], ProductLimits(pixel_bytes=pixel_bytes, fewest_samples=4))
    assert torch.equal(found[12:, :3], found[:3, 12:].T)
    assert torch.allclose(found, G @ G.T)


def test_passes_have_cross_terms():
    uses = [drawn(2, (2, 2), geometry()), drawn(3, (2, 2), geometry(), seed=1)]
    G = torch.cat([written_out(use) for use in uses])
    found = pair_gram(uses)
    assert torch.allclose(found, G @ G.T)


def test_some_output_channels():
    use = drawn(4, (2, 2), geometry()).restricted(torch.tensor([1, 4, 5]))
    G = written_out(use)
    assert torch.allclose(pair_gram([use]), G @ G.T)


def test_cheaper_only_for_many_channels_on_few_positions():
    assert pairs_are_cheaper([drawn(4, (2, 2), geometry())])
    assert not pairs_are_cheaper([drawn(4, (9, 9), geometry())])
    assert not pairs_are_cheaper([drawn(4, (3, 3), geometry(), channels=(2, 3))])


def test_memory_bounds_the_form():
    use = drawn(4, (2, 2), geometry())
    assert pairs_are_cheaper([use], ProductLimits(pixel_bytes=4 * 16 * 8))
    assert not pairs_are_cheaper([use], ProductLimits(pixel_bytes=4 * 16 * 8 - 1))


def test_memory_counts_a_grid_of_outputs_larger_than_that_of_pixels():
    use = drawn(4, (2,), geometry(1, padding=2), channels=(90, 80))  # four outputs
    assert pairs_are_cheaper([use], ProductLimits(pixel_bytes=4 * 16 * 8))
    assert not pairs_are_cheaper([use], ProductLimits(pixel_bytes=4 * 16 * 8 - 1))


@pytest.mark.parametrize(
    "other",
    [
        drawn(3, (3, 2), geometry()),
        drawn(3, (2, 2), geometry(kernel=2)),
        drawn(3, (2, 2), geometry(groups=2)),
    ],
    ids=["another size", "another kernel", "groups"],
)
def test_passes_that_do_not_fit_together_are_left_alone(other: Convolution):
    assert not pairs_are_cheaper([drawn(3, (2, 2), geometry()), other])
    assert not pairs_are_cheaper([other, drawn(3, (2, 2), geometry())])


@pytest.mark.parametrize("layout", [Layout(2), Layout(4, samples=torch.tensor([3, 2, 1, 0]))], ids=["positions", "routed"])
def test_several_images_of_a_sample_are_left_alone(layout: Layout):
    alone = drawn(4, (2, 2), geometry())
    use = Convolution(Operation("conv"), layout, alone.inputs, alone.geometry)
    use.complete(alone.output_gradients)
    assert not pairs_are_cheaper([use])


@pytest.mark.parametrize("passes", [1, 2])
def test_the_parameter_takes_this_form_by_itself(passes: int):
    uses = [drawn(3, (2, 2), geometry(), seed=seed) for seed in range(passes)]
    shape = (WIDE[1], WIDE[0], 3, 3)
    view = View("weight", 0, ((torch.Size(shape).numel(), 1),), shape, True)
    G = torch.cat([written_out(use) for use in uses])
    found = parameter_gram([[Placed(view, use)] for use in uses], [3] * passes, Scratch())
    assert found is not None
    assert torch.equal(found, pair_gram(uses))
    assert torch.allclose(found, G @ G.T)
    assert factored_gram([*([use] for use in uses), []], [3] * passes + [1], Scratch()) is None
    empty = parameter_gram([[Placed(view, use)] for use in uses] + [[]], [3] * passes + [1], Scratch())
    assert empty is not None
    assert torch.allclose(empty[:-1, :-1], G @ G.T)
    assert not empty[-1].any()
