"""Convolutions: per-sample weight gradients, one grouped product or unfolded patches."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvature_callbacks.gram.uses.elementwise import BIAS, Elementwise
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout, LayoutOf
from curvature_callbacks.gram.uses.uses import Tap, Use
from curvature_callbacks.library_internals.tensors import convolution_backward

# On a CPU thread samples as groups cost 1.0 to 2.0 times the gradient of the batch within these bounds; beyond them 16 times
# at 128 channels (4 x 4, N = 64) and 7 times at 3, where patches cost 7 and 5 times.
_MAX_GROUPED: Final = 64 * 32 * 9  # weights of one group
_MIN_CHANNELS: Final = 8  # inputs of one group
_PATCH_BYTES: Final = 16 << 20  # of patches unfolded at a time


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Of a convolution in n dimensions; every tuple has one entry a dimension."""

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
    """A convolution kernel: `g_i = sum_t left_it patch_it'`, t the output positions.

    Args:
        operation: `conv1d`, `conv2d`, `conv3d`, with `grouped` before it where channels are grouped.
        layout: where the samples are in input and output; or N.
        inputs: (R, C_in, ...), R samples or (sample, position) pairs.
        geometry: of the convolution.
    """

    def __init__(self, operation: Operation, layout: Layout | int, inputs: Tensor, geometry: Geometry) -> None:
        self.operation = operation
        self._layout = layout if isinstance(layout, Layout) else Layout(layout)
        self.num_samples = self._layout.num_samples
        self.inputs = inputs.detach()  # its graph is not the use's
        self.geometry = geometry
        self._rows: Tensor | None = None

    @property
    def output_gradients(self) -> Tensor:
        """(R, C_out, ...), of the output channels counted."""
        assert self.gradient is not None
        return self.gradient if self._rows is None else self.gradient[:, self._rows]

    @property
    def has_own_images(self) -> bool:
        """Whether every sample has one image, all of whose channels meet."""
        return self.geometry.groups == 1 and self._layout.rows is None and len(self.inputs) == self.num_samples

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product on patches that do not overlap."""
        return self.geometry.groups == 1 and self.geometry.tiles

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Gradients of the output channels `start:stop`, (N, stop - start, C_in / groups, ...)."""
        if self.is_product:
            left, right = self.factors()
            left = left[:, :, start:stop].mT
            return left @ right if out is None else torch.bmm(left, right, out=out)
        found = self._channels(start, stop, out)
        return found if out is None or found is out else out.copy_(found.reshape(out.shape))

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(output gradients (N, T, C_out), patches (N, T, C_in * kernel))` of an ungrouped convolution."""
        assert self.gradient is not None
        left = self._layout.sample_major(self.gradient.movedim(1, -1)).reshape(self.num_samples, -1, self.gradient.shape[1])
        patches = unfold(self.inputs, self.geometry)  # (R, positions, C_in * kernel)
        right = self._layout.sample_major(patches).reshape(self.num_samples, -1, patches.shape[-1])
        return (left if self._rows is None else left[:, :, self._rows]), right

    def layer_vectors(self) -> tuple[Tensor, Tensor]:
        """`(patches (N, T, C_in * kernel), output gradients (N, T, C_out))` of an ungrouped convolution."""
        outputs, patches = self.factors()
        return patches, outputs

    def restricted(self, rows: Tensor) -> "Convolution":
        """Fewer output channels."""
        use = copy.copy(self)
        use._rows = rows if self._rows is None else self._rows[rows]
        return use

    def tensors(self) -> list[Tensor]:
        """Input and output gradient."""
        return [self.inputs] if self.gradient is None else [self.inputs, self.gradient]

    def moved(self, device: torch.device) -> "Convolution":
        """Both."""
        assert self.gradient is not None
        use = copy.copy(self)
        use.inputs = self.inputs.to(device)
        use.gradient = self.gradient.to(device)
        return use

    def _channels(self, start: int, stop: int, out: Tensor | None) -> Tensor:
        """Gradients of some output channels: all are computed where they lie across groups."""
        assert self.gradient is not None
        groups = self.geometry.groups
        chosen = slice(start, stop) if self._rows is None else self._rows[start:stop]
        if groups == 1:
            return self._by_sample(self.gradient[:, chosen], 1, out)
        return self._by_sample(self.gradient, groups, None)[:, chosen]

    def _by_sample(self, outputs: Tensor, groups: int, out: Tensor | None) -> Tensor:
        """(N, channels, C_in / groups, ...) by the quicker way."""
        C = self.inputs.shape[1] // groups
        size = C * (outputs.shape[1] // groups) * prod(self.geometry.kernel)
        if outputs.device.type != "cpu" or (size <= _MAX_GROUPED and (C >= _MIN_CHANNELS or groups > 1)):
            found = self._weight_gradients(self.inputs.flatten(0, 1)[None], outputs.flatten(0, 1)[None], len(outputs), groups)
        else:
            found = self._by_patches(outputs, groups, out if len(outputs) == self.num_samples else None)
        if len(found) == self.num_samples and self._layout.rows is None:
            return found
        return self._layout.sample_major(found).sum(1)

    def _by_patches(self, outputs: Tensor, groups: int, out: Tensor | None) -> Tensor:
        """Products with unfolded patches, some samples at a time."""
        R, D, C = *outputs.shape[:2], self.inputs.shape[1] // groups
        kernel = self.geometry.kernel
        found = outputs.new_empty(R, D, C, *kernel) if out is None else out
        products = found.view(R * groups, D // groups, C * prod(kernel))
        sample_bytes = self.inputs.shape[1] * prod(kernel) * prod(outputs.shape[2:]) * outputs.element_size()
        step = max(1, _PATCH_BYTES // sample_bytes)
        for start in range(0, R, step):
            patches = windows(self.inputs[start : start + step], self.geometry)
            patches = _kernel_first(patches, len(kernel)).reshape(-1, C * prod(kernel), prod(outputs.shape[2:]))
            right = outputs[start : start + step].reshape(len(patches), D // groups, -1)
            torch.bmm(right, patches.mT, out=products[start * groups : start * groups + len(patches)])
        return found

    def _weight_gradients(self, inputs: Tensor, outputs: Tensor, samples: int, groups: int) -> Tensor:
        """(samples, channels, C_in / groups, ...) by one convolution whose groups are the samples and their groups."""
        g = self.geometry
        shape = (outputs.shape[1], inputs.shape[1] // (samples * groups), *g.kernel)
        weight = inputs.new_empty(()).expand(shape)
        mask = (False, True, False)
        _, found, _ = convolution_backward(
            outputs, inputs, weight, None, g.stride, g.padding, g.dilation, False, [0] * len(g.kernel), samples * groups, mask
        )
        gradients: Tensor = found.reshape(samples, -1, *shape[1:])
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
    """(R, C_in, *kernel, *output grid)"""
    return patches.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))


def convolution_rule(n: int) -> Any:
    """The rule of the `n`-dimensional convolution."""

    def rule(
        layout_of: LayoutOf,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> list[tuple[Tensor, Tap]]:
        layout = layout_of(output)
        if layout is not None and layout.positions_first:  # a convolution has its samples first
            layout = Layout(layout.num_samples) if len(output) % layout.num_samples == 0 else None
        if layout is None or input.ndim != n + 2:
            return []
        geometry = Geometry(
            kernel=tuple(weight.shape[2:]),
            stride=_per_dimension(stride, n),
            padding=(0,) * n if isinstance(padding, str) else _per_dimension(padding, n),
            dilation=_per_dimension(dilation, n),
            groups=groups,
        )
        if padding == "same":
            input = pad(input, _same_padding(geometry))
        operation = Operation(f"conv{n}d", has_factors=True) if groups == 1 else Operation(f"grouped conv{n}d")
        taps: list[tuple[Tensor, Tap]] = [(weight, Convolution(operation, layout, input, geometry))]
        if bias is not None:
            taps.append((bias, Elementwise(BIAS, layout, bias.shape, aligned=(len(bias), *(1,) * n))))
        return taps

    return rule


def _per_dimension(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _same_padding(geometry: Geometry) -> list[int]:
    """As `padding="same"` does: the odd element goes to the end."""
    amounts: list[int] = []
    for kernel, dilation in zip(reversed(geometry.kernel), reversed(geometry.dilation), strict=True):
        total = dilation * (kernel - 1)
        amounts += [total // 2, total - total // 2]
    return amounts
