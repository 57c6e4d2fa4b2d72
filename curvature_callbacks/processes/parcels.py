"""Parcels: anything that holds tensors, on its way between processes."""

import io
import pickle
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from curvature_callbacks.processes.world import World

Parcel = tuple[bytes, list[Tensor]]  # pickled without its tensors, and these, each once


def delivered_parcels(parcels: Sequence[Parcel], world: World, device: torch.device) -> list[Any]:
    """What the processes packed for this one, by rank; nothing for those of a rank to which nobody sends in this turn.

    Args:
        parcels: for each of the first ranks what goes there; all processes pack for the same ranks.
        world: the processes.
        device: where the received tensors are put.
    """
    labels = world.gathered([(pickled, [_size(tensor) for tensor in tensors]) for pickled, tensors in parcels])
    is_idle = world.rank >= len(parcels)
    sizes = [[] if is_idle else label[world.rank][1] for label in labels]
    sent = [tensors for _, tensors in parcels] + [[] for _ in range(world.size - len(parcels))]
    received = world.delivered(sent, sizes)
    if is_idle:
        return []
    return [unpacked(label[world.rank][0], tensors, device) for label, tensors in zip(labels, received, strict=True)]


def handed_round(result: Any, world: World, device: torch.device) -> list[Any]:
    """The results of all processes, by rank, their tensors on `device`."""
    pickled, tensors = packed(result)
    results = []
    for source, (label, sizes) in enumerate(world.gathered((pickled, [_size(tensor) for tensor in tensors]))):
        shapes = tensors if source == world.rank else [_like(shape, dtype, device) for shape, dtype in sizes]
        results.append(unpacked(label, world.broadcast(shapes, source=source), device))
    return results


def packed(value: Any) -> Parcel:
    """`value` pickled without its tensors, and these, each once."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def unpacked(pickled: bytes, tensors: Sequence[Tensor], device: torch.device) -> Any:
    """What was packed, its tensors on `device`."""
    return _Unpickler(io.BytesIO(pickled), [tensor.to(device) for tensor in tensors]).load()


def _like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that shape and dtype that takes no memory."""
    return torch.empty((), dtype=dtype, device=device).expand(shape)


def _size(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


@final
class _Pickler(pickle.Pickler):
    """Leaves tensors out: a number stands for each, its index in `tensors`."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._indices: dict[int, int] = {}  # identity of a tensor to its index

    @override
    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        index = self._indices.setdefault(id(value), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(value)
        return index


@final
class _Unpickler(pickle.Unpickler):
    """Puts tensors in again by their index."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    @override
    def persistent_load(self, index: Any) -> Any:
        return self._tensors[index]
