"""Rules: which operation makes which use of its parameters.

A rule has the signature of its operation, after `layout_of` and the operation's output, so that Python binds positional and
keyword arguments alike. It returns the operands it can vouch for, each with its tap; a parameter left out is copied for every
sample or takes the exact fallback row by row. The `Operation` in the tap says what K-FAC can make of it: nothing, unless it is
the weight of a layer (`has_factors`, `transposed`) or the bias of the other operands (`is_bias`).

To add one, write the function here and its line in `RULES`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from inspect import signature
from types import MappingProxyType
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from curvature_callbacks.gram.capture.convolution_rules import CONVOLUTION_RULES
from curvature_callbacks.gram.capture.norm_rules import NORM_RULES
from curvature_callbacks.gram.uses.elementwise import BIAS, SCALE, SHIFT, Elementwise
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout, LayoutOf
from curvature_callbacks.gram.uses.uses import Lookup, OuterProduct, RuleTaps, Tap, Use

Rule = Callable[..., RuleTaps]

LINEAR: Final = Operation("linear", has_factors=True)
TRANSPOSED_LINEAR: Final = Operation("transposed linear", has_factors=True, transposed=True)
_FROM_THE_RIGHT: Final = Operation("matmul", transposed=True)
_FROM_THE_LEFT: Final = Operation("matmul")
_BILINEAR: Final = Operation("bilinear")


def _linear_rule(layout_of: LayoutOf, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> RuleTaps:
    layout = layout_of(output)
    if layout is None or (input.ndim == 1 and layout.num_samples > 1):
        return []
    taps: RuleTaps = [(weight, OuterProduct(LINEAR, layout, input))]
    return taps + _biases(layout, bias)


def _addmm_rule(
    layout_of: LayoutOf, output: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> RuleTaps:
    """Hugging Face's Conv1D: `bias + x @ weight` with weight (d_in, d_out)."""
    layout = layout_of(output)
    if layout is None or beta != 1 or alpha != 1 or input.ndim != 1:
        return []
    taps: RuleTaps = [(mat2, OuterProduct(TRANSPOSED_LINEAR, layout, mat1))]
    return taps + _biases(layout, input)


def _matmul_rule(layout_of: LayoutOf, output: Tensor, input: Tensor, other: Tensor) -> RuleTaps:
    """`x @ parameter` with a vector or matrix; `matrix @ x` with a batch of matrices, the sample before their axes."""
    layout = layout_of(output)
    if layout is None or output.ndim == 0:
        return []
    taps: RuleTaps = []
    if other.ndim == 1 and input.ndim > 1:
        column = OuterProduct(_FROM_THE_RIGHT, layout, input)
        taps.append((other, _Rearranged(column, partial(torch.unsqueeze, dim=-1))))
    if other.ndim == 2 and input.ndim > 1:
        taps.append((other, OuterProduct(_FROM_THE_RIGHT, layout, input)))
    if input.ndim == 2 and other.ndim > 2:
        on_columns = OuterProduct(_FROM_THE_LEFT, layout, other.mT)
        taps.append((input, _Rearranged(on_columns, partial(torch.transpose, dim0=-2, dim1=-1))))
    return taps


@final
class _Rearranged(Tap):
    """A tap of an operation whose output has another shape than the tap expects; `rearrange` mends its gradient."""

    def __init__(self, tap: Tap, rearrange: Callable[[Tensor], Tensor]) -> None:
        self.operation, self.num_samples = tap.operation, tap.num_samples
        self._tap = tap
        self._rearrange = rearrange

    @override
    def completed(self, gradient: Tensor) -> Use:
        return self._tap.completed(self._rearrange(gradient))


def _bilinear_rule(
    layout_of: LayoutOf, output: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> RuleTaps:
    layout = layout_of(output)
    if layout is None or output.ndim < 2:
        return []
    pairs = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    taps: RuleTaps = [(weight, OuterProduct(_BILINEAR, layout, pairs))]
    return taps + _biases(layout, bias)


def _biases(layout: Layout, bias: Tensor | None) -> RuleTaps:
    return [] if bias is None else [(bias, Elementwise(BIAS, layout, bias.shape))]


def _embedding_rule(
    layout_of: LayoutOf,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> RuleTaps:
    layout = layout_of(output)
    if layout is None or scale_grad_by_freq or input.ndim == 0:
        return []
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return [(weight, Lookup(layout, input, padding))]


def _multiply_rule(layout_of: LayoutOf, output: Tensor, input: Any, other: Any) -> RuleTaps:
    """`weight * x` in either order: the scale of every Hugging Face RMSNorm, LayerScale."""
    layout = layout_of(output)
    return [
        (parameter, Elementwise(SCALE, layout, parameter.shape, partial(torch.Tensor.detach, factor)))
        for parameter, factor in ((input, other), (other, input))
        if layout and isinstance(factor, Tensor) and _leaves_samples_apart(layout, output, parameter)
    ]


def _add_rule(layout_of: LayoutOf, output: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> RuleTaps:
    """`x + parameter` in either order: position embeddings, biases kept outside their layer."""
    layout = layout_of(output)
    return [
        (parameter, Elementwise(SHIFT, layout, parameter.shape))
        for parameter in (input, other)
        if layout and alpha == 1 and _leaves_samples_apart(layout, output, parameter)
    ]


def _prelu_rule(layout_of: LayoutOf, output: Tensor, input: Tensor, weight: Tensor) -> RuleTaps:
    layout = layout_of(output)
    if layout is None:
        return []
    aligned = (len(weight), *(1,) * (input.ndim - 2)) if weight.numel() > 1 else (1,)
    return [(weight, Elementwise(SCALE, layout, weight.shape, partial(torch.clamp_max, input, 0.0), aligned=aligned))]


def _leaves_samples_apart(layout: Layout, output: Tensor, parameter: Any) -> bool:
    """Whether `parameter` is a tensor broadcast along the axis of `output` that holds the samples."""
    if not isinstance(parameter, Tensor):
        return False
    if parameter.ndim < output.ndim:
        axis = 1 if layout.samples_on_second_axis(output) else 0
        return parameter.ndim < output.ndim - axis or parameter.shape[0] == 1
    return parameter.ndim == output.ndim and parameter.shape[1 if layout.samples_on_second_axis(output) else 0] == 1


RULES: Final[Mapping[Any, Rule]] = MappingProxyType(
    {
        F.linear: _linear_rule,
        torch.addmm: _addmm_rule,
        F.embedding: _embedding_rule,
        F.bilinear: _bilinear_rule,
        F.prelu: _prelu_rule,
        **CONVOLUTION_RULES,
        **NORM_RULES,
        **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul_rule),
        **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply_rule),
        **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__), _add_rule),
    }
)

_IN_PLACE: Final = frozenset(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul"))


def rule_for(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    """The rule of an operation; None where it has none, or none for these arguments (`out=`, a dtype): another overload."""
    rule = RULES.get(func)
    return rule if rule is not None and _takes(rule, len(args), frozenset(kwargs)) else None


@cache
def _takes(rule: Rule, num_positional: int, names: frozenset[str]) -> bool:
    """Whether so many positional arguments and keywords of these names fit the signature of `rule`."""
    try:
        signature(rule).bind(None, None, *[None] * num_positional, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def is_indexing(func: Any) -> bool:
    """Whether the operation is `tensor[index]`, which picks a part of a parameter."""
    return bool(func is Tensor.__getitem__)


def is_in_place(func: Any) -> bool:
    """Whether the operation changes its first operand."""
    name = str(getattr(func, "__name__", ""))
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


def operation_without_rule(func: Any) -> Operation:
    """What messages call an operation that has no rule here."""
    return Operation(str(getattr(func, "__name__", func)).strip("_"))
