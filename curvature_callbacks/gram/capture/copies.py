"""Spreading: a parameter that meets activations in an operation without a rule enters as one copy a sample.

The copies are activations like any other, and the gradient of a sample's copy is its per-sample gradient.
"""

from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks.gram.uses.elementwise import Elementwise
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout
from curvature_callbacks.gram.uses.uses import Dense, Tap

_SPREAD: Final = Operation("spread")
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


def spread(
    func: Any, args: Any, value: Tensor, output: Tensor, layout: Layout | None, num_samples: int
) -> tuple[Tensor, Tap] | None:
    """Copies of `value` to take its place among the operands, and the tap for their gradient; None where that cannot be.

    Args:
        func: the operation.
        args: its positional arguments.
        value: the operand that depends on parameters only.
        output: what the operation gave.
        layout: where the samples are in `output`.
        num_samples: N.
    """
    if num_samples == 1:
        return value, _OnlySample(value.shape)
    if layout is None or layout.positions_first:
        return None
    if func is torch.einsum:
        return _for_einsum(args, value, num_samples)
    enters_batched = func in _ELEMENTWISE or (func in _BATCHED and value.ndim > 2)
    if enters_batched and (value.ndim < output.ndim or value.shape[0] == 1):
        shape = (1,) * (output.ndim - value.ndim) + tuple(value.shape)
        return value.reshape(shape).expand(output.shape[0], *shape[1:]), Elementwise(_SPREAD, layout, value.shape)
    if value.ndim > 0 and value.shape[0] == output.shape[0] and layout.rows is None:
        return value, _OwnRows(layout, value.shape)
    return None


def with_sample_letter(args: Any, copied: set[int]) -> Any:
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
    if not isinstance(args[0], str) or "->" not in args[0] or any(not isinstance(one, Tensor) for one in args[1:]):
        return None
    letters = [part.strip() for part in args[0].partition("->")[0].split(",")]
    own = [part for part, operand in zip(letters, args[1:], strict=True) if operand is value]
    others = [(part, operand) for part, operand in zip(letters, args[1:], strict=True) if operand is not value]
    if len(own) != 1 or not others or not others[0][0] or not others[0][0][0].isalpha():
        return None
    sample, operand = others[0][0][0], others[0][1]
    if operand.shape[0] != num_samples or sample in own[0] or "." in own[0]:
        return None
    copies = value.unsqueeze(0).expand(num_samples, *value.shape)
    return copies, Elementwise(_SPREAD, Layout(num_samples), value.shape)


@final
class _OnlySample(Tap):
    """A source in a microbatch of one row: the gradient of the source is that of the sample."""

    operation = _SPREAD
    num_samples = 1

    def __init__(self, shape: torch.Size) -> None:
        self._shape = shape

    def completed(self, gradient: Tensor) -> Dense:
        """With the sample axis."""
        return Dense(self.operation, gradient.reshape(1, *(self._shape or (1,))))


@final
class _OwnRows(Tap):
    """A source that has rows of its own for every sample already: each sample's gradient is zero at the others' rows."""

    operation = _SPREAD

    def __init__(self, layout: Layout, shape: torch.Size) -> None:
        self.num_samples = layout.num_samples
        self._shape = shape

    def completed(self, gradient: Tensor) -> Dense:
        """Block-diagonal in samples."""
        N = self.num_samples
        own = gradient.reshape(N, -1, *self._shape[1:])  # (N, rows of a sample, ...)
        total = gradient.new_zeros(N, N, *own.shape[1:])
        total[range(N), range(N)] = own
        return Dense(self.operation, total.reshape(N, *self._shape))
