"""Elementwise: a parameter that scales or shifts activations."""

from collections.abc import Callable
from typing import Final, final

import torch
from torch import Tensor
from typing_extensions import override

from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout
from curvature_callbacks.gram.uses.uses import Dense, Tap

BIAS: Final = Operation("bias", is_bias=True)
SCALE: Final = Operation("scale")
SHIFT: Final = Operation("shift")


@final
class Elementwise(Tap):
    """A parameter that scales or shifts activations: `g_i` is the output gradient, times the factor, summed to its shape.

    It is reduced at once: a per-sample gradient is no larger than the output.

    Args:
        operation: `BIAS`, `SCALE`, `SHIFT`, or one that spreads the parameter over the samples.
        layout: where the samples are in the output; or N, with the samples on axis 0.
        shape: the parameter's shape.
        factor: gives what the parameter was multiplied with, in the output's shape; None for an addition.
        fresh: whether `factor` gives a new tensor every time, to be overwritten.
        aligned: the shape in which the parameter is broadcast against the output, where it is not `shape` (a channel).
    """

    def __init__(
        self,
        operation: Operation,
        layout: Layout | int,
        shape: torch.Size,
        factor: Callable[[], Tensor] | None = None,
        *,
        fresh: bool = False,
        aligned: tuple[int, ...] | None = None,
    ) -> None:
        self.operation = operation
        self._layout = layout if isinstance(layout, Layout) else Layout(layout)
        self.num_samples = self._layout.num_samples
        self._shape = shape
        self._aligned = tuple(shape) if aligned is None else aligned
        self._factor = factor
        self._fresh = fresh

    @override
    def completed(self, gradient: Tensor) -> Dense:
        if self._factor is not None and self._is_channel(gradient):
            return self._of_channel(gradient, self._factor())
        value = gradient if self._factor is None else self._product(gradient, self._factor())
        value = self._layout.sample_major(value)
        aligned = self._beside_samples(gradient)
        ones = (1,) * (value.ndim - 1 - len(aligned))
        reduced = value.sum_to_size(self.num_samples, *ones, *aligned)
        return Dense(self.operation, reduced.reshape(self.num_samples, *(self._shape or (1,))))

    def _product(self, gradient: Tensor, factor: Tensor) -> Tensor:
        return factor.mul_(gradient) if self._fresh else gradient * factor

    def _is_channel(self, gradient: Tensor) -> bool:
        """Whether the parameter belongs to axis 1 and everything after it is summed."""
        if gradient.ndim < 3 or self._aligned != (gradient.shape[1], *(1,) * (gradient.ndim - 2)):
            return False
        return gradient.is_contiguous() and not self._layout.samples_on_second_axis(gradient)

    def _of_channel(self, gradient: Tensor, factor: Tensor) -> Dense:
        """Inner products over the positions, without their elementwise product."""
        count, channels = gradient.shape[:2]
        products = gradient.reshape(count * channels, 1, -1) @ factor.reshape(count * channels, -1, 1)
        value = self._layout.sample_major(products.view(count, channels))
        return Dense(self.operation, value if value.ndim == 2 else value.sum(1))

    def _beside_samples(self, gradient: Tensor) -> tuple[int, ...]:
        """`aligned` without the axis that holds the samples in `gradient`."""
        if len(self._aligned) < gradient.ndim:
            return self._aligned
        first, *rest = self._aligned
        return (first, *rest[1:]) if self._layout.samples_on_second_axis(gradient) else tuple(rest)
