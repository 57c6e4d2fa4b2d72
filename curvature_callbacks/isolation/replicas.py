"""Replicas of what user code changes in place, so that the original can be put back untouched."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn

from curvature_callbacks.isolation.objects import CONTAINERS, attributes, is_array, is_generator, slots
from curvature_callbacks.isolation.snapshot import put_back
from curvature_callbacks.library_internals.modules import internal_attributes, registries_of

_LARGEST_TENSOR: Final = 1 << 22  # elements; larger tensors and arrays hold data, not running values
_LONGEST_CONTAINER: Final = 1 << 16  # entries; of longer ones the entries are shared
_DEPTH: Final = 3  # of plain objects within each other
_NOT_COPIED: Final = frozenset({"builtins", "torch", "lightning", "pytorch_lightning", "transformers", "accelerate", "peft"})


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
def attributes_set_aside(modules: Sequence[nn.Module], *, shared: Iterable[Any] = ()) -> Iterator[None]:
    """Every module works on replicas of its own attributes: collected outputs, running means, metrics, generators.

    Submodules, parameters and hooks registered inside are gone afterwards: those who do so at the first call note it among the
    attributes, and would do it again. Modules kept in plain lists and dicts, which torch does not register, are set aside too.

    Args:
        modules: whose attributes.
        shared: objects that are used as they are, because somebody else puts them back.
    """
    memo: dict[int, Any] = {id(value): value for value in shared}
    internal = internal_attributes()
    owners = list(dict.fromkeys([*modules, *_modules_in_containers(modules)]))
    saved = [(owner, {name: value for name, value in owner.__dict__.items() if name not in internal}) for owner in owners]
    with put_back([registry for owner in owners for registry in registries_of(owner)]):
        try:
            for owner, before in saved:
                owner.__dict__.update({name: replica(value, memo) for name, value in before.items()})
            yield
        finally:
            for owner, before in saved:
                for name in [name for name in owner.__dict__ if name not in internal and name not in before]:
                    del owner.__dict__[name]
                owner.__dict__.update(before)


def _modules_in_containers(modules: Sequence[nn.Module]) -> list[nn.Module]:
    held = [value for module in modules for value in module.__dict__.values() if type(value) in (list, dict)]
    values = [item for value in held for item in (value.values() if isinstance(value, dict) else value)]
    return [child for value in values if isinstance(value, nn.Module) for child in value.modules()]


def _replica(value: Any, memo: dict[int, Any]) -> Any:
    cls = type(value)
    if cls is Tensor:
        return value.detach().clone() if value.numel() <= _LARGEST_TENSOR else value
    if is_array(cls):
        return value.copy() if value.size <= _LARGEST_TENSOR else value
    if cls is torch.Generator:
        return torch.Generator(value.device).set_state(value.get_state())
    if is_generator(cls):
        return copy.deepcopy(value)
    if cls in (tuple, *CONTAINERS):
        return _container(value, memo)
    return _plain_object(value, memo) if _is_plain(value) else value


def _container(value: Any, memo: dict[int, Any]) -> Any:
    if len(value) > _LONGEST_CONTAINER or isinstance(value, set):
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
    cls: Any = type(value)
    result = memo[id(value)] = cls.__new__(cls)
    for name, item in _fields(value).items():
        object.__setattr__(result, name, replica(item, memo))
    return result


def _fields(value: Any) -> dict[str, Any]:
    return {member.__name__: content for member, content in slots(value).items()} | (attributes(value) or {})


def _is_plain(value: Any, depth: int = 0) -> bool:
    cls = type(value)
    if cls is SimpleNamespace:
        return all(_is_simple(item, depth) for item in vars(value).values())
    if isinstance(value, nn.Module | type) or cls.__module__.partition(".")[0] in _NOT_COPIED:
        return False
    hooks = ("__copy__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__", "__new__")
    has_own = any(getattr(cls, hook, None) is not getattr(object, hook, None) for hook in hooks)
    if has_own or not (hasattr(value, "__dict__") or hasattr(cls, "__slots__")):
        return False
    return all(_is_simple(item, depth) for item in _fields(value).values())


def _is_simple(item: Any, depth: int) -> bool:
    cls = type(item)
    return (
        item is None
        or cls in (bool, int, float, str, Tensor, tuple, *CONTAINERS)
        or is_array(cls)
        or is_generator(cls)
        or (depth < _DEPTH and _is_plain(item, depth + 1))
    )
