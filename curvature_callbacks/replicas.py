"""Replicas of what user code changes in place, so that the original can be put back untouched."""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any, Final

import torch
from torch import Tensor, nn

_ELEMENTS: Final = 1 << 22  # larger tensors and arrays hold data, not running values
_ITEMS: Final = 1 << 16  # so do longer containers
_DICTS: Final = (dict, defaultdict, OrderedDict, Counter)


def replica(value: Any, memo: dict[int, Any]) -> Any:
    """`value` with copies of the containers, small tensors, generators and plain objects in it; anything else is shared.

    A plain object is one whose class says nothing about copying or pickling (an average meter). Data sets, tokenizers,
    trainers and modules are shared: copying them would be slow or wrong.

    Args:
        value: any attribute.
        memo: identity to replica, so that what is shared stays shared.

    Cost: one copy of the small things.
    """
    if id(value) not in memo:
        memo[id(value)] = _replica(value, memo)
    return memo[id(value)]


def _replica(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is Tensor:
        return value.detach().clone() if value.numel() <= _ELEMENTS else value
    if _is_array(kind):
        return value.copy() if value.size <= _ELEMENTS else value
    if kind is torch.Generator:
        return torch.Generator(value.device).set_state(value.get_state())
    if is_generator(kind):
        return copy.deepcopy(value)
    if kind in (list, tuple, set, deque, *_DICTS):
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
    result = memo[id(value)] = object.__new__(type(value))
    result.__dict__.update({name: replica(item, memo) for name, item in value.__dict__.items()})
    return result


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if isinstance(value, nn.Module | type) or kind.__module__.partition(".")[0] in (
        "builtins",
        "torch",
        "lightning",
        "pytorch_lightning",
    ):
        return False
    hooks = ("__copy__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__", "__new__")
    own = any(getattr(kind, hook, None) is not getattr(object, hook, None) for hook in hooks)
    items = getattr(value, "__dict__", None)
    return items is not None and not own and all(_is_simple(item) for item in items.values())


def _is_simple(item: Any) -> bool:
    kind = type(item)
    return (
        item is None
        or kind in (bool, int, float, str, Tensor, list, tuple, set, deque, *_DICTS)
        or _is_array(kind)
        or is_generator(kind)
    )


def is_generator(kind: type) -> bool:
    """Whether it is a generator of torch, NumPy or Python."""
    of_numpy = kind.__module__.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState")
    return kind in (torch.Generator, random.Random) or of_numpy


def _is_array(kind: type) -> bool:
    return kind.__module__ == "numpy" and kind.__name__ == "ndarray"
