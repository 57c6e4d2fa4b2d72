"""Objects that user code may change: what they are made of, and which of them can be reached."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor

DICTS: Final = (dict, defaultdict, OrderedDict, Counter)
CONTAINERS: Final = (list, set, deque, *DICTS)
_SEARCH_OBJECTS: Final = 5000  # objects looked at
_SEARCH_WIDTH: Final = 64  # containers with more entries hold data: they are put back, what lies in them is not looked at
_LEAVES: Final = (str, bytes, int, float, type, ModuleType, type(None))
_OF_THREADS: Final = frozenset({"queue", "threading", "multiprocessing", "concurrent", "asyncio"})  # which go on meanwhile


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
    return [*(attributes(value) or {}).values(), *slots(value).values()]


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def attributes(value: Any) -> dict[str, Any] | None:
    """The dict in which an object keeps its attributes, itself; None for one without, and for tensors."""
    if isinstance(value, Tensor):
        return None
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return own if type(own) is dict else None


def slots(value: Any) -> dict[MemberDescriptorType, Any]:
    """Value of each slot that is set, by the descriptor of the class that reads and writes it."""
    contents: dict[MemberDescriptorType, Any] = {}
    for member in slot_members(type(value)):
        with suppress(AttributeError):  # declared and not set
            contents[member] = member.__get__(value)
    return contents


def slot_members(cls: type) -> list[MemberDescriptorType]:
    """The descriptors that read and write the `__slots__` of a class and of its bases."""
    declaring = [vars(base) for base in cls.__mro__ if "__slots__" in vars(base)]  # other classes have members of C code
    return [member for members in declaring for member in members.values() if isinstance(member, MemberDescriptorType)]


def is_generator(cls: type) -> bool:
    """Whether it is a class of generators of torch, NumPy or Python with a state: the system's has none."""
    of_numpy = cls.__module__.startswith("numpy.random") and cls.__name__ in ("Generator", "RandomState")
    return of_numpy or (issubclass(cls, torch.Generator | random.Random) and not issubclass(cls, random.SystemRandom))


def is_array(cls: type) -> bool:
    """Whether it is the class of NumPy's arrays."""
    return cls.__module__ == "numpy" and cls.__name__ == "ndarray"
