"""Rules of convolutions: which use each makes of its weight and its bias, and where these have Kronecker factors."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import pad

from curvature_callbacks.gram.uses.convolution import Convolution, Geometry
from curvature_callbacks.gram.uses.elementwise import BIAS, Elementwise
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout, LayoutOf
from curvature_callbacks.gram.uses.uses import RuleTaps


def _convolution_rule(n: int) -> Callable[..., RuleTaps]:
    """The rule of the `n`-dimensional convolution."""

    layer = Operation(f"conv{n}d", has_factors=True)
    grouped = Operation(f"grouped conv{n}d")

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
    ) -> RuleTaps:
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
        taps: RuleTaps = [(weight, Convolution(layer if groups == 1 else grouped, layout, input, geometry))]
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


CONVOLUTION_RULES: Final[Mapping[Any, Callable[..., RuleTaps]]] = MappingProxyType(
    {F.conv1d: _convolution_rule(1), F.conv2d: _convolution_rule(2), F.conv3d: _convolution_rule(3)}
)
