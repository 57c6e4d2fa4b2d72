"""What a data set counts and keeps while a probe reads it is put back: content, not only attributes."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch

from curvature_callbacks import DatasetProbes
from curvature_callbacks.isolation.snapshot import put_back, refill


class Counting:
    """A data set that does `change(kept, row)` whenever a row is read."""

    def __init__(self, kept: Any, change: Callable[[Any, int], Any]) -> None:
        self.kept = kept
        self.change = change

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> int:
        self.change(self.kept, row)
        return row


@dataclass(slots=True)
class Reads:
    """Counts in slots, one of them with a name of its class's own."""

    count: int = 0
    __last: int | None = None

    def add(self, row: int) -> None:
        self.count += 1
        self.__last = row


class Cache:
    __slots__ = ("rows",)

    def fill(self, row: int) -> None:
        self.rows = row


def read(kept: Any, change: Callable[[Any, int], Any]) -> None:
    """One probe of six rows."""
    probes = DatasetProbes(Counting(kept, change), list, num_microbatches=2, microbatch_size=3)
    assert sum(microbatch.num_rows for microbatch in probes.draw(0)) == 6


def add_one(kept: Any, row: int) -> None:
    kept[row] += 1


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: [0] * 8, add_one),
        (lambda: ["seen"], list.append),
        (lambda: {1: 5}, lambda kept, row: kept.update({row: kept.get(row, 0) + 1})),
        (lambda: {row: row for row in range(1000)}, lambda kept, row: kept.pop(row)),
        (lambda: defaultdict(int, {1: 5}), add_one),
        (lambda: Counter({1: 5, 2: -1}), add_one),
        (lambda: OrderedDict.fromkeys(range(8)), OrderedDict.move_to_end),
        (lambda: {1, 100}, set.add),
        (lambda: deque([1, 2], maxlen=3), deque.append),
        (lambda: {"by row": {"counts": [0] * 8}}, lambda kept, row: add_one(kept["by row"]["counts"], row)),
    ],
    ids=["list", "longer", "dict", "long", "defaultdict", "Counter", "order", "set", "deque", "nested"],
)
def test_containers_are_filled_as_they_were(make: Callable[[], Any], change: Callable[[Any, int], Any]) -> None:
    kept = make()
    read(kept, change)
    assert kept == make()
    assert list(kept) == list(make()), "in the same order"
    assert type(kept) is type(make())


def test_slots_hold_what_they_held() -> None:
    kept = [Reads(), Cache()]
    read(kept, lambda kept, row: (kept[0].add(row), kept[1].fill(row)))
    assert kept[0] == Reads()
    assert not hasattr(kept[1], "rows")


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: torch.tensor([float("nan")] * 8), lambda kept, row: kept[row].fill_(1)),
        (lambda: torch.zeros(4, 2, dtype=torch.bfloat16).T, lambda kept, row: kept[row % 2].add_(1)),
        (lambda: torch.zeros((), dtype=torch.bool), lambda kept, row: kept.fill_(True)),
        (lambda: torch.zeros(8), lambda kept, row: kept.numpy().__setitem__(row, 1)),
        (lambda: np.zeros(8), add_one),
        (lambda: np.full(8, np.nan), lambda kept, row: kept.__setitem__(row, 1)),
        (lambda: np.array([None] * 8), lambda kept, row: kept.__setitem__(row, row)),
        (lambda: np.zeros((2, 8))[1], add_one),
    ],
    ids=["nan", "transposed", "scalar", "through NumPy", "array", "array of nan", "array of objects", "view of an array"],
)
def test_tensors_and_arrays_hold_what_they_held(make: Callable[[], Any], change: Callable[[Any, int], Any]) -> None:
    kept, before = make(), make()
    read(kept, change)
    np.testing.assert_array_equal(*(value.float() if isinstance(value, torch.Tensor) else value for value in (kept, before)))


def test_what_did_not_change_is_not_written_to() -> None:
    kept = [torch.tensor([float("nan")]), torch.zeros(3)]
    read(kept, lambda kept, row: None)
    assert [value._version for value in kept] == [0, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(8).share_memory_(),
        lambda: torch.from_numpy(np.frombuffer(bytearray(32), dtype=np.float32)),
        lambda: np.frombuffer(bytearray(64)),
        lambda: torch.zeros((1 << 20) + 1),
        lambda: torch.zeros(8, requires_grad=True),
    ],
    ids=["shared", "of NumPy over other memory", "array over other memory", "large", "with a gradient"],
)
def test_memory_that_others_may_write_to_is_left_alone(make: Callable[[], Any]) -> None:
    kept = make()
    with torch.no_grad():
        read(kept, add_one)
    assert kept.sum() == 6


def test_large_data_do_not_keep_small_counts_from_being_put_back() -> None:
    counts = torch.zeros(8)
    rows, seen = list(range(1 << 20)), [0]
    read([torch.zeros(1 << 20), rows, counts, seen], lambda kept, row: (counts.add_(1), seen.append(row), rows.append(row)))
    assert not counts.any()
    assert seen == [0]
    assert len(rows) == (1 << 20) + 6, "with the others too long to be copied"


@pytest.mark.parametrize(
    "make",
    [lambda: torch.zeros(1, 4).expand(3, 4), lambda: torch.eye(3).to_sparse(), lambda: 1j * torch.ones(2)],
    ids=["expanded", "sparse", "complex"],
)
def test_tensors_of_any_kind_can_be_held(make: Callable[[], Any]) -> None:
    kept = [make(), make().conj()]
    read(kept, lambda kept, row: None)
    assert torch.equal(kept[0].to_dense(), make().to_dense())


def test_what_is_seen_through_an_expanded_tensor_is_put_back() -> None:
    counts = torch.zeros(1, 4)
    read([counts, counts.expand(3, 4)], lambda kept, row: counts.add_(1))
    assert not counts.any()


def test_a_tensor_resized_in_place_is_left_alone() -> None:
    kept = torch.zeros(2)
    read(kept, lambda kept, row: kept.resize_(3))
    assert kept.shape == (3,)


def test_what_threads_exchange_is_left_alone() -> None:
    queue: Queue[int] = Queue()
    read(queue, Queue.put)
    assert queue.qsize() == 6


def test_the_systems_generator_has_no_state() -> None:
    read({"own": random.SystemRandom()}, lambda kept, row: kept["own"].random())


def test_content_is_put_back_after_an_exception() -> None:
    def broken(kept: list[int], row: int) -> None:
        kept.clear()
        raise OSError("disk")

    kept = [1]
    with pytest.raises(OSError, match="disk"):
        read(kept, broken)
    assert kept == [1]


def test_a_set_keeps_its_order_where_its_copy_has_another() -> None:
    container = {8, 0}
    first, second = container
    refill(container, [second, first])
    assert list(container) == [first, second]


@pytest.mark.parametrize("make", [list, set, deque, dict.fromkeys])
def test_refilling_compares_identities(make: Any) -> None:
    first, second = torch.zeros(2), torch.zeros(2)
    container = make([first])
    refill(container, container.copy())
    assert next(iter(container)) is first
    refill(container, make([second]))
    assert next(iter(container)) is second
    assert len(container) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: random,
        lambda: random.Random(1),
        lambda: np.random,
        lambda: np.random.RandomState(1),
        lambda: np.random.default_rng(1),
        lambda: torch.Generator().manual_seed(1),
        lambda: torch.default_generator,
    ],
    ids=["random", "Random", "numpy.random", "RandomState", "numpy's Generator", "torch's Generator", "torch's default"],
)
def test_a_generator_goes_on_where_it_was(make: Callable[[], Any]) -> None:
    generator = make()

    def draw() -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand((), generator=generator))
        return float(generator.random())

    with put_back([generator]):
        first = draw()
    assert draw() == first


def test_values_are_put_back_after_an_exception() -> None:
    numbers, names, tensor = {"a": 1}, ["x"], torch.zeros(3)

    def change() -> None:
        numbers["b"] = 2
        names.clear()
        tensor.view(3)[1] = 5
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), put_back([numbers, names, tensor]):
        change()
    assert numbers == {"a": 1}
    assert names == ["x"]
    assert not tensor.any()
