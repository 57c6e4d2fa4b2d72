"""Generators that a loss may draw from: begun at a seed for an evaluation, and put back behind it."""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final

import torch
from torch import nn

from curvature_callbacks.isolation.objects import CONTAINERS, is_generator, reachable
from curvature_callbacks.isolation.snapshot import generator_state, set_generator_state

_NUMPY_SEEDS: Final = 2**32
_LONGEST: Final = 64  # entries of a container that is looked into


def global_generators(device: torch.device) -> list[Any]:
    """Those of torch on the CPU and on `device`, of Python and, last, where it is imported, of NumPy.

    torch's one by one: `torch.manual_seed` would also move the generators of every accelerator on the machine.
    """
    numpy: Any = sys.modules.get("numpy")
    return [*_of_torch(device), random, *([] if numpy is None else [numpy.random])]


def kept_generators(model: nn.Module, *functions: Any) -> list[Any]:
    """Generators among the attributes of the model's modules, or in containers there, and those that functions reach by their
    closures; each once."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    within = chain.from_iterable(_held_in(value) for value in attributes if type(value) in (tuple, *CONTAINERS))
    held = [value for value in chain(attributes, within, reachable(functions)) if is_generator(type(value))]
    return list({id(value): value for value in held}.values())


@contextmanager
def begun_at(generators: Sequence[Any], seed: int) -> Iterator[None]:
    """The generators begin at `seed`, and go on afterwards where they were."""
    before = [(generator, generator_state(generator)) for generator in generators]
    try:
        for generator in generators:
            begin(generator, seed)
        yield
    finally:
        for generator, state in before:
            set_generator_state(generator, state)


def begin(generator: Any, seed: int) -> None:
    """Put a generator of torch, Python or NumPy, or the module that stands for one, to where `seed` begins."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif generator is random or isinstance(generator, random.Random):
        generator.seed(seed)
    elif hasattr(generator, "seed"):
        generator.seed(seed % _NUMPY_SEEDS)
    else:
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


def has_moved(generator: Any, state: Any) -> bool:
    """Whether a generator is not where it was when `generator_state` gave `state`."""
    return not _are_same_states(generator_state(generator), state)


def _are_same_states(now: Any, before: Any) -> bool:
    if isinstance(now, torch.Tensor):
        return torch.equal(now, before)
    if isinstance(now, dict):
        return all(_are_same_states(now[name], before[name]) for name in now)
    if isinstance(now, tuple):
        return all(map(_are_same_states, now, before))
    return bool((now == before).all()) if hasattr(now, "all") else bool(now == before)


def _held_in(container: Any) -> list[Any]:
    """Of a container; none of one that is long, which holds data."""
    values = list(container.values()) if isinstance(container, dict) else list(container)
    return values if len(values) <= _LONGEST else []


def _of_torch(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]
