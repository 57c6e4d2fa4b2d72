"""Sample axis: where the samples are in an activation, and which activations depend on samples at all."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

LayoutOf = Callable[[Tensor], "Layout | None"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How the leading axes of an activation hold the samples; a claim, which the random-sign certificate proves.

    By default axis 0 is the sample, or (sample, position) pairs with a sample's positions together.

    Attributes:
        num_samples: N.
        positions_first: axis 0 is the position and axis 1 the sample, or (position, sample) pairs (attention that works
            sequence-first inside).
        samples: (R,) the sample of each entry of axis 0, where they were picked one by one (tokens routed to an expert).
    """

    num_samples: int
    positions_first: bool = False
    samples: Tensor | None = None

    def sample_major(self, tensor: Tensor) -> Tensor:
        """`tensor` with the sample on axis 0; positions on axis 1 where a sample has several entries, padded by zeros."""
        N = self.num_samples
        if self.samples is not None:
            return _padded(tensor, self.samples, N)
        if self.samples_on_second_axis(tensor):
            return tensor.transpose(0, 1)
        if self.positions_first:
            return tensor.reshape(-1, N, *tensor.shape[1:]).transpose(0, 1)
        return tensor if tensor.shape[0] == N else tensor.reshape(N, -1, *tensor.shape[1:])

    def samples_on_second_axis(self, tensor: Tensor) -> bool:
        """Whether axis 1 of `tensor` is the sample."""
        return self.positions_first and _has_second_axis(tensor, self.num_samples)

    def vectors(self, tensor: Tensor) -> Tensor:
        """`tensor` as (N, T, d), d its last axis."""
        return self.sample_major(tensor).reshape(self.num_samples, -1, tensor.shape[-1])


def layout_of(tensor: Tensor, num_samples: int, samples: Tensor | None, *, positions_first: bool) -> Layout | None:
    """The layout to try for an activation, or None where its shape has no room for the samples.

    Args:
        tensor: the activation.
        num_samples: N.
        samples: (R,) the sample of each entry of axis 0, where known.
        positions_first: whether to read it sequence-first where both ways are possible.
    """
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        return None
    if samples is not None:
        return Layout(num_samples, samples=samples)
    divisible = tensor.shape[0] % num_samples == 0
    if positions_first and (divisible or _has_second_axis(tensor, num_samples)):
        return Layout(num_samples, positions_first=True)
    if divisible:
        return Layout(num_samples)
    return Layout(num_samples, positions_first=True) if _has_second_axis(tensor, num_samples) else None


def _has_second_axis(tensor: Tensor, num_samples: int) -> bool:
    return tensor.ndim > 2 and tensor.shape[1] == num_samples


def _padded(tensor: Tensor, samples: Tensor, num_samples: int) -> Tensor:
    """(N, T, ...) with T the most entries a sample has."""
    counts = torch.bincount(samples, minlength=num_samples)
    order = torch.argsort(samples, stable=True)
    ordered = samples[order]
    position = torch.arange(len(samples), device=samples.device) - (counts.cumsum(0) - counts)[ordered]
    result = tensor.new_zeros(num_samples, max(int(counts.max()), 1), *tensor.shape[1:])
    result[ordered, position] = tensor[order]
    return result


_CONSTANT: Final = "_curvature_constant"

_SAMPLES: Final = "_curvature_samples"


@final
class Provenance:
    """Which tensors depend on neither samples nor parameters, and which sample each entry of a routed activation belongs to.

    A tensor without a mark is an activation. Marks lie on tensors made inside the pass and vanish with them.

    Args:
        constants: buffers and frozen parameters; kept by identity, they are the user's.
        num_samples: N.
    """

    def __init__(self, constants: Iterable[Tensor], num_samples: int) -> None:
        self._constants = {id(tensor) for tensor in constants}
        self._num_samples = num_samples

    def add(self, constant: Tensor) -> None:
        """Mark a gathered frozen parameter as constant."""
        setattr(constant, _CONSTANT, True)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether `tensor` was computed from buffers and literals alone."""
        return id(tensor) in self._constants or hasattr(tensor, _CONSTANT)

    def samples(self, tensor: Tensor) -> Tensor | None:
        """(R,) the sample of each entry of axis 0, where entries were picked one by one."""
        samples: Tensor | None = getattr(tensor, _SAMPLES, None)
        return samples if samples is not None and tensor.ndim and len(samples) == tensor.shape[0] else None

    def mark(self, func: Any, args: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Mark what an operation gave by what it was given."""
        if all(self.is_constant(tensor) for tensor in inputs):
            for output in outputs:
                if id(output) not in self._constants:
                    setattr(output, _CONSTANT, True)
            return
        self._unmark(func, args, outputs)
        samples = self._picked(func, args, inputs)
        if samples is None:
            samples = next((known for tensor in inputs if (known := self.samples(tensor)) is not None), None)
        if samples is not None:
            for output in outputs:
                if output.ndim and output.shape[0] == len(samples):
                    setattr(output, _SAMPLES, samples)

    def _unmark(self, func: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        """What an activation was written into is no constant any more."""
        changed = [args[0]] if func is Tensor.__setitem__ else outputs
        for tensor in changed:
            if isinstance(tensor, Tensor) and hasattr(tensor, _CONSTANT):
                delattr(tensor, _CONSTANT)

    def _picked(self, func: Any, args: Sequence[Any], inputs: Sequence[Tensor]) -> Tensor | None:
        """Samples of `activation[indices]`, the tokens an expert receives."""
        if func is not Tensor.__getitem__ or not any(args[0] is tensor for tensor in inputs) or args[0].ndim == 0:
            return None
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
            return None
        known = self.samples(args[0])
        if known is not None:
            return known[index]
        positions, rest = divmod(args[0].shape[0], self._num_samples)
        return None if rest or positions == 0 else index // positions
