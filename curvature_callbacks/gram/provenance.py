"""Provenance: what is known about a tensor of the forward pass, kept as a mark on the tensor itself."""

from collections.abc import Iterable, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor

_CONSTANT: Final = "_curvature_constant"
_ROWS: Final = "_curvature_rows"


@final
class Provenance:
    """Which tensors depend on neither samples nor parameters, and which sample each row of a routed activation belongs to.

    A tensor without a mark is an activation. Marks lie on tensors made inside the pass and vanish with them.

    Args:
        constants: buffers and frozen parameters; kept by identity, they are the user's.
        num_samples: N.
    """

    def __init__(self, constants: Iterable[Tensor], num_samples: int) -> None:
        self._constants = {id(tensor) for tensor in constants}
        self._num_samples = num_samples

    def add(self, constant: Tensor) -> None:
        """A frozen parameter that was put together inside the pass."""
        setattr(constant, _CONSTANT, True)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether `tensor` was computed from buffers and literals alone."""
        return id(tensor) in self._constants or hasattr(tensor, _CONSTANT)

    def rows(self, tensor: Tensor) -> Tensor | None:
        """(R,) the sample of each entry of axis 0, where entries were picked one by one."""
        rows: Tensor | None = getattr(tensor, _ROWS, None)
        return rows if rows is not None and tensor.ndim and len(rows) == tensor.shape[0] else None

    def mark(self, func: Any, args: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Mark what an operation gave by what it was given."""
        if all(self.is_constant(tensor) for tensor in inputs):
            for output in outputs:
                if id(output) not in self._constants:
                    setattr(output, _CONSTANT, True)
            return
        self._unmark(func, args, outputs)
        rows = self._picked(func, args, inputs)
        if rows is None:
            rows = next((found for tensor in inputs if (found := self.rows(tensor)) is not None), None)
        if rows is not None:
            for output in outputs:
                if output.ndim and output.shape[0] == len(rows):
                    setattr(output, _ROWS, rows)

    def _unmark(self, func: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        """What an activation was written into is no constant any more."""
        changed = [args[0]] if func is Tensor.__setitem__ else outputs
        for tensor in changed:
            if isinstance(tensor, Tensor) and hasattr(tensor, _CONSTANT):
                delattr(tensor, _CONSTANT)

    def _picked(self, func: Any, args: Sequence[Any], inputs: Sequence[Tensor]) -> Tensor | None:
        """Samples of `activation[indices]`, the tokens an expert receives."""
        if func is not Tensor.__getitem__ or not any(args[0] is one for one in inputs) or args[0].ndim == 0:
            return None
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
            return None
        known = self.rows(args[0])
        if known is not None:
            return known[index]
        positions, rest = divmod(args[0].shape[0], self._num_samples)
        return None if rest or positions == 0 else index // positions
