"""Snapshots: what generators, containers, tensors and arrays hold is copied, and put back where it has changed."""

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MemberDescriptorType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from curvature_callbacks.isolation.objects import CONTAINERS, attributes, is_array, is_generator, reachable, slot_members, slots
from curvature_callbacks.library_internals.tensors import version_of

_MOST_ENTRIES: Final = 1 << 20  # copied of containers; 8 MB of pointers
_MOST_ELEMENTS: Final = 1 << 20  # copied of tensors and arrays; counts and running values are small, data are not


@contextmanager
def put_back(values: Iterable[Any]) -> Iterator[None]:
    """Put back the contents of each value when the block ends, also by an exception, in the given order.

    Args:
        values: lists, dicts, sets, deques; strided tensors and NumPy arrays that may be written to; generators, and modules
            that stand for one (`random`, `numpy.random`); any other object for what it keeps in `__slots__`. The attributes
            of an object are the dict that `attributes` gives.

    Cost: a copy of each; of containers their pointers.
    """
    restores = [_restore_of(value) for value in values]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def undisturbed(*owners: Any) -> AbstractContextManager[None]:
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
    objects = list(reachable(owners))
    generators = [value for value in objects if is_generator(type(value))]
    of_objects = [held for value in objects if (held := attributes(value)) is not None]
    slotted = [value for value in objects if not is_generator(type(value)) and slot_members(type(value))]
    containers = [value for value in objects if type(value) in CONTAINERS]
    arrays = [value for value in objects if _is_own_tensor(value) or _is_own_array(value)]
    return put_back(
        [
            *generators,
            *of_objects,
            *slotted,
            *_smallest(containers, len, _MOST_ENTRIES),
            *_smallest(arrays, _num_elements, _MOST_ELEMENTS),
        ]
    )


def _restore_of(value: Any) -> Callable[[], None]:
    if isinstance(value, Tensor):
        return partial(_rewrite_tensor, value, value.clone(), version_of(value))
    if is_array(type(value)):
        return partial(_rewrite_array, value, value.copy())
    if isinstance(value, list | dict | set | deque):
        return partial(refill, value, dict(value) if isinstance(value, dict) else list(value))
    if is_generator(type(value)) or isinstance(value, ModuleType):
        return partial(set_generator_state, value, generator_state(value))
    return partial(_refill_slots, value, slots(value))


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


def _refill_slots(value: Any, content: Mapping[MemberDescriptorType, Any]) -> None:
    now = slots(value)
    for member in now.keys() - content.keys():
        member.__delete__(value)
    for member, before in content.items():
        if member not in now or now[member] is not before:
            member.__set__(value, before)


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _rewrite_tensor(value: Tensor, saved: Tensor, version: int) -> None:
    """Written to only where it changed; one whose shape was changed in place is left alone."""
    if value.shape != saved.shape:
        return
    is_changed = version_of(value) != version or (value.is_cpu and not torch.equal(_bits(value), _bits(saved)))
    if is_changed:  # the bits tell what was written through a view of NumPy, which counts no version
        with torch.no_grad():
            value.copy_(saved)


def _rewrite_array(value: Any, saved: Any) -> None:
    """Write `saved` back where the bytes differ; those of an array of objects are the objects' addresses."""
    if value.shape == saved.shape and value.tobytes() != saved.tobytes():
        value[...] = saved


def _bits(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)


def generator_state(generator: Any) -> Any:
    """The state of a generator of torch, Python or NumPy, or of the module that stands for one: a copy."""
    if hasattr(generator, "getstate"):  # Python's
        return generator.getstate()
    if hasattr(generator, "get_state"):  # PyTorch's, and NumPy's older ones
        return generator.get_state()
    return generator.bit_generator.state


def set_generator_state(generator: Any, state: Any) -> None:
    """Put such a generator to where `generator_state` gave `state`."""
    if hasattr(generator, "setstate"):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _smallest(values: list[Any], size: Callable[[Any], int], limit: int) -> list[Any]:
    """The smallest of `values`, at most `limit` in all by `size`: counts and running values are smaller than data."""
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
