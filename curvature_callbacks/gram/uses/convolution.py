"""Convolutions: per-sample weight gradients, one grouped product or unfolded patches."""

import copy
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout
from curvature_callbacks.gram.uses.uses import Use
from curvature_callbacks.library_internals.tensors import convolution_backward


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ConvolutionLimits:
    """When the samples are the groups of one convolution, and when their patches are unfolded: a matter of time alone.

    On a CPU thread samples as groups cost 1.0 to 2.0 times the gradient of the batch within these bounds; beyond them 16 times
    at 128 channels (4 x 4, N = 64) and 7 times at 3, where patches cost 7 and 5 times.

    Attributes:
        max_grouped: most weights of one group.
        min_channels: fewest inputs of one group.
        patch_bytes: of patches unfolded at a time.
    """

    max_grouped: int = 64 * 32 * 9
    min_channels: int = 8
    patch_bytes: int = 16 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes of a convolution in n dimensions; every tuple has one entry a dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def tiles(self) -> bool:
        """Whether the patches do not overlap, so that unfolding costs no memory (patch embeddings, 1 x 1)."""
        return self.kernel == self.stride and not any(self.padding) and set(self.dilation) == {1}


@final
class Convolution(Use):
    """A convolution kernel: `g_i = sum_t left_it patch_it'`, (N, C_out, C_in / groups, ...), t the output positions.

    Args:
        operation: `conv1d`, `conv2d`, `conv3d`, with `grouped` before it where channels are grouped.
        layout: where the samples are in input and output; or N.
        inputs: (R, C_in, ...), R samples or (sample, position) pairs.
        geometry: of the convolution.

    Attributes:
        limits: which of two ways is taken for the gradients of single samples, and in what pieces.
    """

    limits = ConvolutionLimits()

    def __init__(self, operation: Operation, layout: Layout | int, inputs: Tensor, geometry: Geometry) -> None:
        self.operation = operation
        self._layout = layout if isinstance(layout, Layout) else Layout(layout)
        self.num_samples = self._layout.num_samples
        self.inputs = inputs.detach()  # its graph is not the use's
        self.geometry = geometry
        self._chosen: Tensor | None = None

    @property
    def output_gradients(self) -> Tensor:
        """(R, C_out, ...), of the output channels counted."""
        assert self.gradient is not None
        return self.gradient if self._chosen is None else self.gradient[:, self._chosen]

    @property
    def has_own_images(self) -> bool:
        """Whether every sample has one image, all of whose channels meet."""
        return self.geometry.groups == 1 and self._layout.samples is None and len(self.inputs) == self.num_samples

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product on patches that do not overlap."""
        return self.geometry.groups == 1 and self.geometry.tiles

    @override
    def slices(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        if self.is_product:
            left, right = self.factors()
            left = left[:, :, start:stop].mT
            return left @ right if out is None else torch.bmm(left, right, out=out)
        gradients = self._channels(start, stop, out)
        return gradients if out is None or gradients is out else out.copy_(gradients.reshape(out.shape))

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(output gradients (N, T, C_out), patches (N, T, C_in * kernel))` of an ungrouped convolution."""
        assert self.gradient is not None
        left = self._layout.sample_major(self.gradient.movedim(1, -1)).reshape(self.num_samples, -1, self.gradient.shape[1])
        patches = unfold(self.inputs, self.geometry)  # (R, positions, C_in * kernel)
        right = self._layout.sample_major(patches).reshape(self.num_samples, -1, patches.shape[-1])
        return (left if self._chosen is None else left[:, :, self._chosen]), right

    def layer_vectors(self) -> tuple[Tensor, Tensor]:
        """`(patches (N, T, C_in * kernel), output gradients (N, T, C_out))` of an ungrouped convolution."""
        outputs, patches = self.factors()
        return patches, outputs

    @override
    def restricted(self, chosen: Tensor) -> "Convolution":
        use = copy.copy(self)
        use._chosen = chosen if self._chosen is None else self._chosen[chosen]
        return use

    @override
    def tensors(self) -> list[Tensor]:
        return [self.inputs] if self.gradient is None else [self.inputs, self.gradient]

    @override
    def moved(self, device: torch.device) -> "Convolution":
        assert self.gradient is not None
        use = copy.copy(self)
        use.inputs = self.inputs.to(device)
        use.gradient = self.gradient.to(device)
        return use

    def _channels(self, start: int, stop: int, out: Tensor | None) -> Tensor:
        """Gradients of some output channels: all are computed where they lie across groups."""
        assert self.gradient is not None
        groups = self.geometry.groups
        chosen = slice(start, stop) if self._chosen is None else self._chosen[start:stop]
        if groups == 1:
            return self._by_sample(self.gradient[:, chosen], 1, out)
        return self._by_sample(self.gradient, groups, None)[:, chosen]

    def _by_sample(self, outputs: Tensor, groups: int, out: Tensor | None) -> Tensor:
        """(N, channels, C_in / groups, ...) by the quicker way."""
        C, limits = self.inputs.shape[1] // groups, self.limits
        size = C * (outputs.shape[1] // groups) * prod(self.geometry.kernel)
        if outputs.device.type != "cpu" or (size <= limits.max_grouped and (limits.min_channels <= C or groups > 1)):
            gradients = self._by_groups(self.inputs.flatten(0, 1)[None], outputs.flatten(0, 1)[None], len(outputs), groups)
        else:
            gradients = self._by_patches(outputs, groups, out if len(outputs) == self.num_samples else None)
        if len(gradients) == self.num_samples and self._layout.samples is None:
            return gradients
        return self._layout.sample_major(gradients).sum(1)

    def _by_patches(self, outputs: Tensor, groups: int, out: Tensor | None) -> Tensor:
        """Products with unfolded patches, some samples at a time."""
        R, D, C = *outputs.shape[:2], self.inputs.shape[1] // groups
        kernel = self.geometry.kernel
        gradients = outputs.new_empty(R, D, C, *kernel) if out is None else out
        products = gradients.view(R * groups, D // groups, C * prod(kernel))
        sample_bytes = self.inputs.shape[1] * prod(kernel) * prod(outputs.shape[2:]) * outputs.element_size()
        step = max(1, self.limits.patch_bytes // sample_bytes)
        for start in range(0, R, step):
            patches = windows(self.inputs[start : start + step], self.geometry)
            patches = _kernel_first(patches, len(kernel)).reshape(-1, C * prod(kernel), prod(outputs.shape[2:]))
            right = outputs[start : start + step].reshape(len(patches), D // groups, -1)
            torch.bmm(right, patches.mT, out=products[start * groups : start * groups + len(patches)])
        return gradients

    def _by_groups(self, inputs: Tensor, outputs: Tensor, samples: int, groups: int) -> Tensor:
        """(samples, channels, C_in / groups, ...) by one convolution whose groups are the samples and their groups."""
        g = self.geometry
        shape = (outputs.shape[1], inputs.shape[1] // (samples * groups), *g.kernel)
        weight = inputs.new_empty(()).expand(shape)
        mask = (False, True, False)
        _, flat, _ = convolution_backward(
            outputs, inputs, weight, None, g.stride, g.padding, g.dilation, False, [0] * len(g.kernel), samples * groups, mask
        )
        gradients: Tensor = flat.reshape(samples, -1, *shape[1:])
        return gradients


def windows(inputs: Tensor, geometry: Geometry) -> Tensor:
    """(R, C_in, *output grid, *kernel) view of the padded (R, C_in, ...): what the kernel sees at every output position."""
    padded = pad(inputs, [amount for size in reversed(geometry.padding) for amount in (size, size)])
    for axis, (kernel, stride, dilation) in enumerate(zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)):
        padded = padded.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return padded


def unfold(inputs: Tensor, geometry: Geometry) -> Tensor:
    """(R, output positions, C_in * kernel) patches of (R, C_in, ...)."""
    n = len(geometry.kernel)
    patches = windows(inputs, geometry).movedim(1, 1 + n)
    return patches.reshape(len(inputs), prod(patches.shape[1 : 1 + n]), -1)


def _kernel_first(patches: Tensor, n: int) -> Tensor:
    """(R, C_in, *kernel, *output grid) view of `windows` in n dimensions."""
    return patches.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
