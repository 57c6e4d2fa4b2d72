"""Parcels: anything that holds tensors, on its way between processes."""

import io
import pickle
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from curvature_callbacks.processes.world import World

Parcel = tuple[bytes, list[Tensor]]  # pickled without its tensors, and these, each once


def delivered(parcels: Sequence[Parcel], world: World, device: torch.device) -> list[Any]:
    """What the processes packed for this one, by rank; nothing where it owns nothing in this turn."""
    labels = world.gathered([(form, [_size(one) for one in tensors]) for form, tensors in parcels])
    idle = world.rank >= len(parcels)
    sizes = [[] if idle else label[world.rank][1] for label in labels]
    sent = [tensors for _, tensors in parcels] + [[] for _ in range(world.size - len(parcels))]
    found = world.delivered(sent, sizes)
    if idle:
        return []
    return [unpacked(label[world.rank][0], tensors, device) for label, tensors in zip(labels, found, strict=True)]


def handed_round(result: Any, world: World, device: torch.device) -> list[Any]:
    """The results of all processes, by rank."""
    label, tensors = packed(result)
    found = []
    for source, (form, sizes) in enumerate(world.gathered((label, [_size(one) for one in tensors]))):
        own = source == world.rank
        there = tensors if own else [_like(shape, dtype, device) for shape, dtype in sizes]
        found.append(unpacked(form, world.broadcast(there, source=source), device))
    return found


def _like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that kind that takes no memory."""
    return torch.empty((), dtype=dtype, device=device).expand(shape)


def _size(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def packed(value: Any) -> Parcel:
    """`value` pickled without its tensors, and these, each once."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def unpacked(form: bytes, tensors: Sequence[Tensor], device: torch.device) -> Any:
    """What was packed, its tensors on `device`."""
    return _Unpickler(io.BytesIO(form), [tensor.to(device) for tensor in tensors]).load()


@final
class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        place = self._places.setdefault(id(value), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(value)
        return place


@final
class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> Any:
        return self._tensors[place]
