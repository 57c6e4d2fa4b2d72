"""Replicas of what user code changes in place, so that the original can be put back untouched."""

import copy
import operator
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn

_ELEMENTS: Final = 1 << 22  # larger tensors and arrays hold data, not running values
_ITEMS: Final = 1 << 16  # so do longer containers
_DEPTH: Final = 3  # of plain objects within each other
DICTS: Final = (dict, defaultdict, OrderedDict, Counter)
_LIBRARIES: Final = frozenset({"builtins", "torch", "lightning", "pytorch_lightning", "transformers", "accelerate", "peft"})
_REGISTRIES: Final = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name != "_buffers"]
_INTERNAL: Final = frozenset(nn.Module().__dict__)  # what torch keeps in a module: parameters, hooks, the training flag


def replica(value: Any, memo: dict[int, Any]) -> Any:
    """`value` with copies of the containers, small tensors, generators and plain objects in it; anything else is shared.

    A plain object is one whose class says nothing about copying or pickling (an average meter), or a namespace. Data sets,
    tokenizers, trainers and modules are shared: copying them would be slow or wrong.

    Args:
        value: any attribute.
        memo: identity to replica, so that what is shared stays shared.

    Cost: one copy of the small things.
    """
    if id(value) not in memo:
        memo[id(value)] = _replica(value, memo)
    return memo[id(value)]


@contextmanager
def attributes_set_aside(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Every module works on replicas of its own attributes: collected outputs, running means, metrics, generators.

    Submodules, parameters and hooks registered inside are gone afterwards: those who do so at the first call note it among the
    attributes, and would do it again. Modules kept in plain lists and dicts, which torch does not register, are set aside too.
    """
    memo: dict[int, Any] = {}
    owners = list(dict.fromkeys([*modules, *_modules_in_containers(modules)]))
    saved = [(owner, {name: value for name, value in owner.__dict__.items() if name not in _INTERNAL}) for owner in owners]
    registries = [vars(owner)[name] for owner in owners for name in _REGISTRIES]
    registered = [(found, dict(found)) for found in registries]
    try:
        for owner, attributes in saved:
            owner.__dict__.update({name: replica(value, memo) for name, value in attributes.items()})
        yield
    finally:
        for owner, attributes in saved:
            for name in [name for name in owner.__dict__ if name not in _INTERNAL and name not in attributes]:
                del owner.__dict__[name]
            owner.__dict__.update(attributes)
        for found, before in registered:
            refill(found, before)


def _modules_in_containers(modules: Sequence[nn.Module]) -> list[nn.Module]:
    held = [value for module in modules for value in module.__dict__.values() if type(value) in (list, dict)]
    values = [item for value in held for item in (value.values() if isinstance(value, dict) else value)]
    return [child for value in values if isinstance(value, nn.Module) for child in value.modules()]


def _replica(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is Tensor:
        return value.detach().clone() if value.numel() <= _ELEMENTS else value
    if is_array(kind):
        return value.copy() if value.size <= _ELEMENTS else value
    if kind is torch.Generator:
        return torch.Generator(value.device).set_state(value.get_state())
    if is_generator(kind):
        return copy.deepcopy(value)
    if kind in (list, tuple, set, deque, *DICTS):
        return _container(value, memo)
    return _plain_object(value, memo) if _is_plain(value) else value


def _container(value: Any, memo: dict[int, Any]) -> Any:
    if len(value) > _ITEMS or isinstance(value, set):
        return copy.copy(value)
    if isinstance(value, tuple):
        return tuple(replica(item, memo) for item in value)
    result = memo[id(value)] = copy.copy(value)  # before its items: a container may hold itself
    if isinstance(value, dict):
        for key, item in value.items():
            result[key] = replica(item, memo)
    else:
        result.clear()
        result.extend(replica(item, memo) for item in value)
    return result


def _plain_object(value: Any, memo: dict[int, Any]) -> Any:
    kind: Any = type(value)
    result = memo[id(value)] = kind.__new__(kind)
    for name, item in _fields(value).items():
        object.__setattr__(result, name, replica(item, memo))
    return result


def _fields(value: Any) -> dict[str, Any]:
    """Attributes, those in slots too."""
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _names(slots: Any) -> list[str]:
    return [name for name in ([slots] if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


def _is_plain(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if kind is SimpleNamespace:
        return all(_is_simple(item, depth) for item in vars(value).values())
    if isinstance(value, nn.Module | type) or kind.__module__.partition(".")[0] in _LIBRARIES:
        return False
    hooks = ("__copy__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__", "__new__")
    own = any(getattr(kind, hook, None) is not getattr(object, hook, None) for hook in hooks)
    if own or not (hasattr(value, "__dict__") or hasattr(kind, "__slots__")):
        return False
    return all(_is_simple(item, depth) for item in _fields(value).values())


def _is_simple(item: Any, depth: int) -> bool:
    kind = type(item)
    return (
        item is None
        or kind in (bool, int, float, str, Tensor, list, tuple, set, deque, *DICTS)
        or is_array(kind)
        or is_generator(kind)
        or (depth < _DEPTH and _is_plain(item, depth + 1))
    )


def is_generator(kind: type) -> bool:
    """Whether it is a generator of torch, NumPy or Python with a state: the system's has none."""
    of_numpy = kind.__module__.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState")
    return of_numpy or (issubclass(kind, torch.Generator | random.Random) and not issubclass(kind, random.SystemRandom))


def is_array(kind: type) -> bool:
    """Whether it is that of NumPy's arrays."""
    return kind.__module__ == "numpy" and kind.__name__ == "ndarray"


def refill(container: Any, content: Any) -> None:
    """Back to `content`; compared by identity, for the items may be tensors.

    Args:
        container: a list, dict, set or deque.
        content: a mapping for a dict, else the items.
    """
    now, before = _items(container), _items(content)
    if len(now) == len(before) and all(map(operator.is_, now, before)):
        return
    if isinstance(container, set) and set(map(id, now)) == set(map(id, before)):  # a copied set may have another order
        return
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(content)


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
