"""Generators of torch, Python and NumPy: begun at a seed, compared and put back."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from curvature_callbacks.isolation.generators import begun_at, global_generators, has_moved, kept_generators
from curvature_callbacks.isolation.snapshot import generator_state

KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's own": (lambda: torch.default_generator, lambda _: torch.rand(()).item()),
    "torch": (lambda: torch.Generator().manual_seed(3), lambda generator: torch.rand((), generator=generator).item()),
    "Python's own": (lambda: random, lambda _: random.random()),
    "Python": (lambda: random.Random(3), lambda generator: generator.random()),
    "NumPy's own": (lambda: np.random, lambda _: np.random.rand()),
    "NumPy's older ones": (lambda: np.random.RandomState(3), lambda generator: generator.rand()),
    "NumPy": (lambda: np.random.default_rng(3), lambda generator: generator.random()),
    "NumPy's Mersenne twister": (lambda: np.random.Generator(np.random.MT19937(3)), lambda generator: generator.random()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_at_a_seed_and_goes_on_where_it_was(kind: str) -> None:
    build, drawn = KINDS[kind]
    generator = build()
    before = generator_state(generator)
    numbers = []
    for seed in (2**62 + 1, 2**62 + 1, 7):
        with begun_at([generator], seed):
            begun = generator_state(generator)
            assert not has_moved(generator, begun)
            numbers.append(drawn(generator))
            assert has_moved(generator, begun)
    assert numbers[0] == numbers[1] != numbers[2]
    assert not has_moved(generator, before)


def test_all_of_the_process_are_known() -> None:
    assert global_generators(torch.device("cpu")) == [torch.default_generator, random, np.random]


def test_those_of_modules_and_closures_are_found_once() -> None:
    inner, of_closure = torch.Generator(), np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model.generator = model[1].shared = inner
    model.several = {"noise": (several := np.random.default_rng(1)), "name": 1}
    model.data = [np.random.default_rng(2)] * 65
    assert kept_generators(model, lambda: of_closure) == [inner, several, of_closure]
    assert kept_generators(nn.Linear(2, 2), len) == []
