"""Copies: a parameter that meets activations in an operation without a rule enters as one copy a sample.

The copies are activations like any other, and the gradient of a sample's copy is its per-sample gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from curvature_callbacks.gram.capture.arguments import replaced
from curvature_callbacks.gram.capture.call import Call
from curvature_callbacks.gram.capture.derived import Derived
from curvature_callbacks.gram.uses.elementwise import Elementwise
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout
from curvature_callbacks.gram.uses.uses import Dense, Tap

_SPREAD: Final = Operation("spread")
_COPIED_BYTES: Final = 64 << 20  # most the copies of one operand may take
_ELEMENTWISE: Final = frozenset(
    {
        *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, torch.rsub),
        *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
        *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
        *(torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__),
        *(torch.pow, Tensor.pow, Tensor.__pow__, torch.where, torch.maximum, torch.minimum, torch.lerp, torch.addcmul),
    }
)
_BATCHED: Final = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, F.scaled_dot_product_attention})


@final
@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """One copy a sample of an operand that depends on parameters alone.

    Attributes:
        original: the operand.
        tensor: the copies, to be used in its place.
        tap: makes the per-sample gradients of the operand from the gradient of the copies.
    """

    original: Derived
    tensor: Tensor
    tap: Tap


def copies_for(call: Call, original: Derived, output: Tensor, layout: Layout | None, num_samples: int) -> Copies | None:
    """Copies of one operand of `call`; None where the operation cannot take them, or they take too much memory.

    Args:
        call: the operation.
        original: the operand.
        output: what the operation gave without copies.
        layout: where the samples are in `output`.
        num_samples: N.
    """
    spread = _spread(call, original.value, output, layout, num_samples)
    if spread is None or spread[0].numel() * spread[0].element_size() > _COPIED_BYTES:
        return None
    return Copies(original, *spread)


def run_with(call: Call, copies: Sequence[Copies]) -> Tensor:
    """The operation's output from copies in place of the operands they were made of. Cost: that of the operation."""
    tensors = {id(each.original.value): each.tensor for each in copies}
    args = call.args
    if call.function is torch.einsum:
        args = _with_sample_letter(args, {id(c.original.value) for c in copies if c.tensor.ndim > c.original.value.ndim})

    def swapped(value: Tensor) -> Tensor:
        return tensors.get(id(value), value)

    output: Tensor = call.function(*replaced(args, swapped), **replaced(call.kwargs, swapped))
    return output


def _spread(call: Call, value: Tensor, output: Tensor, layout: Layout | None, num_samples: int) -> tuple[Tensor, Tap] | None:
    """The copies of `value` and their tap."""
    func = call.function
    if num_samples == 1:
        return value, _OnlySample(value.shape)
    if layout is None or layout.positions_first:
        return None
    if func is torch.einsum:
        return _for_einsum(call.args, value, num_samples)
    enters_batched = func in _ELEMENTWISE or (func in _BATCHED and value.ndim > 2)
    if enters_batched and (value.ndim < output.ndim or value.shape[0] == 1):
        shape = (1,) * (output.ndim - value.ndim) + tuple(value.shape)
        return value.reshape(shape).expand(output.shape[0], *shape[1:]), Elementwise(_SPREAD, layout, value.shape)
    if value.ndim > 0 and value.shape[0] == output.shape[0] and layout.samples is None:
        return value, _OwnSlices(layout, value.shape)
    return None


def _with_sample_letter(args: Any, copied: set[int]) -> Any:
    """The arguments of an einsum whose operands with these identities have got a leading sample axis."""
    if not copied:
        return args
    inputs, arrow, result = args[0].partition("->")
    operands = args[1:]
    letters = [part.strip() for part in inputs.split(",")]
    first = next(part[0] for part, operand in zip(letters, operands, strict=True) if id(operand) not in copied)
    named = [first + part if id(operand) in copied else part for part, operand in zip(letters, operands, strict=True)]
    return (",".join(named) + arrow + result, *operands)


def _for_einsum(args: Any, value: Tensor, num_samples: int) -> tuple[Tensor, Tap] | None:
    """`ntd,de->nte` with one matrix a sample: `ntd,nde->nte`."""
    if not isinstance(args[0], str) or "->" not in args[0] or any(not isinstance(operand, Tensor) for operand in args[1:]):
        return None
    letters = [part.strip() for part in args[0].partition("->")[0].split(",")]
    letters_of_value = [part for part, operand in zip(letters, args[1:], strict=True) if operand is value]
    others = [(part, operand) for part, operand in zip(letters, args[1:], strict=True) if operand is not value]
    if len(letters_of_value) != 1 or not others or not others[0][0] or not others[0][0][0].isalpha():
        return None
    sample, operand = others[0][0][0], others[0][1]
    if operand.shape[0] != num_samples or sample in letters_of_value[0] or "." in letters_of_value[0]:
        return None
    copies = value.unsqueeze(0).expand(num_samples, *value.shape)
    return copies, Elementwise(_SPREAD, Layout(num_samples), value.shape)


@final
class _OnlySample(Tap):
    """A tensor in a microbatch of one sample: its gradient is that of the sample."""

    operation = _SPREAD
    num_samples = 1

    def __init__(self, shape: torch.Size) -> None:
        self._shape = shape

    @override
    def completed(self, gradient: Tensor) -> Dense:
        return Dense(self.operation, gradient.reshape(1, *(self._shape or (1,))))


@final
class _OwnSlices(Tap):
    """A tensor that has slices for every sample already: each sample's gradient is zero at the slices of the others."""

    operation = _SPREAD

    def __init__(self, layout: Layout, shape: torch.Size) -> None:
        self.num_samples = layout.num_samples
        self._shape = shape

    @override
    def completed(self, gradient: Tensor) -> Dense:
        N = self.num_samples
        slices = gradient.reshape(N, -1, *self._shape[1:])  # (N, slices of a sample, ...)
        total = gradient.new_zeros(N, N, *slices.shape[1:])
        total[range(N), range(N)] = slices
        return Dense(self.operation, total.reshape(N, *self._shape))
