"""Undisturbed: objects that user code may change while it is called for a probe, put back as they were."""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from curvature_callbacks.isolation.replicas import DICTS, is_array, is_generator, refill

_SEARCH_OBJECTS: Final = 5000  # objects looked at
_SEARCH_WIDTH: Final = 64  # containers with more entries hold data: they are put back, what lies in them is not looked at
_LEAVES: Final = (str, bytes, int, float, type, ModuleType, type(None))
_OF_THREADS: Final = frozenset({"queue", "threading", "multiprocessing", "concurrent", "asyncio"})  # which go on meanwhile
_CONTAINERS: Final = (list, set, deque, *DICTS)
_ENTRIES: Final = 1 << 20  # copied of containers; 8 MB of pointers
_ELEMENTS: Final = 1 << 20  # copied of tensors and arrays; counts and running values are small, data are not


class undisturbed:  # noqa: N801 - reads as a verb in `with`
    """Puts everything that can be reached from the given objects back as it was.

    Generators, attributes, the content of lists, dicts, sets and deques, and that of tensors and NumPy arrays; of containers
    and of tensors the smallest ones, up to about a million entries in all. A data set may open its file at the first access,
    count or cache: what a probe opened in this process must not be inherited by workers forked later, which would then share
    one file offset, and what it counted must not be known to training.

    Left alone: what is written to while a gradient flows, memory that other processes or files may share, what belongs to
    threads, subclasses of the containers, and what lies in a container of more than 64 entries.

    Cost: of a data set that is a list of 1e5 rows 3 ms, a copy of its pointers and their comparison; of a million floats 1.4 ms
    and their copy; 10 us where there is nothing to copy (one core of a server CPU).
    """

    def __init__(self, *owners: Any) -> None:
        self._objects = list(reachable(owners))

    def __enter__(self) -> None:
        generators = [value for value in self._objects if is_generator(type(value))]
        self._states = [(generator, copy.deepcopy(_get_state(generator))) for generator in generators]
        self._attributes = [(found, dict(found)) for value in self._objects if (found := _attributes(value)) is not None]
        containers = [value for value in self._objects if type(value) in _CONTAINERS]
        self._contents = [(value, _content(value)) for value in _smallest(containers, len, _ENTRIES)]
        arrays = [value for value in self._objects if _is_own_tensor(value) or _is_own_array(value)]
        self._values = [
            (value, value.clone(), value._version) if isinstance(value, Tensor) else (value, value.copy(), 0)
            for value in _smallest(arrays, _num_elements, _ELEMENTS)
        ]

    def __exit__(self, *_: object) -> None:
        for generator, state in self._states:
            _set_state(generator, state)
        for found, attributes in self._attributes:
            refill(found, attributes)
        for container, content in self._contents:
            refill(container, content)
        for value, saved, version in self._values:
            _put_back(value, saved, version)


def reachable(owners: tuple[Any, ...]) -> Iterator[Any]:
    """Objects reachable through attributes, closures and small containers, never through user-defined attribute access."""
    waiting, seen, num_objects = deque(owners), set[int](), 0
    while waiting and num_objects < _SEARCH_OBJECTS:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _LEAVES) or type(value).__module__.partition(".")[0] in _OF_THREADS:
            continue
        seen.add(id(value))
        yield value
        num_objects += not isinstance(value, Tensor)  # of which a small container may hold many, and which hold nothing
        if not is_generator(type(value)):
            waiting.extend(_children(value))


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= _SEARCH_WIDTH else []
    if isinstance(value, list | tuple | set | deque):
        return list(value) if len(value) <= _SEARCH_WIDTH else []
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return [*(_attributes(value) or {}).values(), *_slots(value)]


def _attributes(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Tensor):
        return None
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


def _slots(value: Any) -> list[Any]:
    found = []
    for kind in type(value).__mro__:
        for name in vars(kind).get("__slots__", ()):
            with suppress(AttributeError):  # declared and not set
                found.append(object.__getattribute__(value, name))
    return found


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _content(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _smallest(values: list[Any], size: Callable[[Any], int], limit: int) -> list[Any]:
    """Of `values` the smallest, `limit` in all: what is counted in is smaller than the data."""
    chosen, total = [], 0
    for value in sorted(values, key=size):
        total += size(value)
        if total > limit:
            break
        chosen.append(value)
    return chosen


def _num_elements(value: Any) -> int:
    return int(value.numel() if isinstance(value, Tensor) else value.size)


def _is_own_tensor(value: Any) -> bool:
    """Whether it may be written to: not while a gradient flows, nor where memory is shared with processes, files or NumPy."""
    if type(value) is not Tensor or value.device.type not in ("cpu", "cuda") or value.layout is not torch.strided:
        return False
    if value.requires_grad or value.is_inference() or value.is_quantized or value.is_conj() or value.is_neg():
        return False
    memory = value.untyped_storage()
    is_shared = value.is_cpu and memory.is_shared()  # which memory of a GPU always is
    return not is_shared and memory.resizable() and 0 not in value.stride()  # an expanded tensor cannot be copied to


def _is_own_array(value: Any) -> bool:
    """Whether it is a NumPy array in NumPy's own memory."""
    if not is_array(type(value)) or not value.flags.writeable:
        return False
    while is_array(type(value.base)):
        value = value.base
    return bool(value.flags.owndata)


def _put_back(value: Any, saved: Any, version: int) -> None:
    """Written to only where it changed; one whose shape was changed in place is left alone."""
    if value.shape != saved.shape:
        return
    if not isinstance(value, Tensor):
        if value.tobytes() != saved.tobytes():  # of an array of objects these are their identities
            value[...] = saved
    elif value._version != version or (value.is_cpu and not torch.equal(_bits(value), _bits(saved))):  # through a view of NumPy
        with torch.no_grad():
            value.copy_(saved)


def _bits(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)


def _get_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator) or type(generator).__name__ == "RandomState":
        return generator.get_state()
    return generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, torch.Generator) or type(generator).__name__ == "RandomState":
        generator.set_state(state)
    else:
        generator.bit_generator.state = state
