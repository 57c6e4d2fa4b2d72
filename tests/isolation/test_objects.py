"""Which objects are found behind those a user hands over, and what they are made of."""

import functools
import random
from collections import deque
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from curvature_callbacks.isolation.objects import attributes, is_generator, reachable, slots


class Base:
    __slots__ = ("count", "unset")


class Slotted(Base):
    __slots__ = "word"

    def __init__(self, word: Any) -> None:
        self.count, self.word = 3, word


class Guarded:
    """Answers for attributes that it does not have."""

    def __init__(self) -> None:
        self.kept = [1]

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def read(self) -> Any:
        return self.value


def closing_over(value: Any) -> Any:
    return lambda: value


HELD = [7]


@pytest.mark.parametrize(
    "owner",
    [
        HELD,
        {"a": (HELD,)},
        deque([HELD]),
        SimpleNamespace(a=SimpleNamespace(b=HELD)),
        Slotted(HELD),
        functools.partial(print, HELD),
        functools.partial(print, key=HELD),
        closing_over(HELD),
        Holder(HELD).read,
        {1: {2: {3: HELD}}},
    ],
    ids=["itself", "dict", "deque", "attributes", "slots", "partial", "keyword", "closure", "method", "deep"],
)
def test_what_is_held_is_found(owner: Any) -> None:
    assert any(value is HELD for value in reachable((owner,)))


@pytest.mark.parametrize("owner", [[HELD] * 65, Queue], ids=["a long container", "a class"])
def test_data_and_classes_are_not_looked_into(owner: Any) -> None:
    assert not any(value is HELD for value in reachable((owner,)))


def test_attributes_are_read_without_asking_the_object() -> None:
    owner = Guarded()
    assert [value for value in reachable((owner,)) if isinstance(value, list)] == [[1]]
    assert attributes(owner) == {"kept": [1]}
    assert attributes(torch.zeros(1)) is None
    assert attributes(3) is None


def test_slots_of_all_bases_but_those_not_set() -> None:
    assert {member.__name__: content for member, content in slots(Slotted("x")).items()} == {"word": "x", "count": 3}
    assert slots(3) == {}


@pytest.mark.parametrize("cls", [torch.Generator, random.Random, np.random.Generator, np.random.RandomState])
def test_generators(cls: type) -> None:
    assert is_generator(cls)
    assert not is_generator(random.SystemRandom)
    assert not is_generator(int)
