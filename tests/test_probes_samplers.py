"""Rows that a loader's sampler leaves out are not drawn, and the sampler is never iterated."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from curvature_callbacks import ConfigurationError, CurvatureMonitor, DatasetProbes, ProbeError
from curvature_callbacks.probes import as_probes, dataset, probes_from_loader, samplers

DATA: Any = list(range(20))
ALL = set(DATA)
SOME = [2, 3, 5, 7, 11, 13, 17, 19]
SIZES = {"num_microbatches": 2, "microbatch_size": 3}
WEIGHTS = [float(row in SOME) for row in DATA]


class OneDatasetEach(BatchSampler):
    """Batches of one data set each, as trainers with a loss for every data set make them."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def __iter__(self) -> Iterator[list[int]]:
        raise AssertionError("the sampler is never iterated")

    def __len__(self) -> int:
        return sum(self.lengths) // 3


def test_a_microbatch_is_of_one_data_set_where_batches_are() -> None:
    both: Any = ConcatDataset([[("a", row) for row in range(20)], [("b", row) for row in range(10)]])  # type: ignore[list-item]
    found = probes_from_loader(DataLoader(both, batch_sampler=OneDatasetEach(20, 10), collate_fn=list), **SIZES)
    assert found is not None
    drawn = [[batch.content for batch in found.draw(seed)] for seed in range(60)]
    kinds = [{name for name, _ in batch} for probe in drawn for batch in probe]
    assert all(len(kind) == 1 for kind in kinds)
    assert {row for probe in drawn for batch in probe for row in batch} == set(both)
    assert 60 < kinds.count({"a"}) < 100  # of 120, by the sizes of the data sets
    assert all(len(set(batch)) == 3 for probe in drawn for batch in probe)
    assert all(len({row for batch in probe for row in batch}) == 6 for probe in drawn)  # without replacement
    assert [batch.content for batch in found.draw(7)] == drawn[7]


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 3, "shuffle": True}])
def test_a_microbatch_mixes_data_sets_where_batches_do(options: dict[str, Any]) -> None:
    both: Any = ConcatDataset([["a"] * 20, ["b"] * 10])  # type: ignore[list-item]
    found = probes_from_loader(DataLoader(both, collate_fn=list, **options), **SIZES)
    assert found is not None
    assert {"a", "b"} in [set(batch.content) for seed in range(20) for batch in found.draw(seed)]


def contents(source: DatasetProbes) -> list[Any]:
    return [microbatch.content for microbatch in source.draw(7)]


def rows_drawn(loader: Any, num_draws: int = 40) -> set[Any]:
    """Rows of many probes."""
    found = probes_from_loader(loader, **SIZES)
    assert found is not None
    return {row for seed in range(num_draws) for batch in found.draw(seed) for row in batch.content}


def loader(sampler: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=4, sampler=sampler, collate_fn=list)


def sharded(sampler: Any) -> DistributedSampler[Any]:
    return DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SubsetRandomSampler(SOME), set(SOME)),
        (lambda: SubsetRandomSampler(torch.tensor(SOME)), set(SOME)),  # type: ignore[arg-type]
        (lambda: WeightedRandomSampler(WEIGHTS, 20), set(SOME)),
        (lambda: SOME, set(SOME)),
        (lambda: tuple(SOME), set(SOME)),
        (lambda: np.array(SOME), set(SOME)),
        (lambda: range(3, 9), set(range(3, 9))),
        (lambda: SequentialSampler(SOME), set(range(8))),
        (lambda: DistributedSampler(SOME, num_replicas=2, rank=0), set(range(8))),  # type: ignore[arg-type]
        (lambda: sharded(SubsetRandomSampler(SOME)), set(SOME)),
        (lambda: sharded(SOME), set(SOME)),
        (lambda: RandomSampler(DATA), ALL),
        (lambda: RandomSampler(DATA, num_samples=5), ALL),
        (lambda: SeedableRandomSampler(DATA, num_samples=5), ALL),
        (lambda: DistributedSampler(DATA, num_replicas=2, rank=0), ALL),
        (lambda: sharded(RandomSampler(DATA)), ALL),
        (lambda: LengthGroupedSampler(4, lengths=DATA), ALL),
    ],
    ids=[
        "subset",
        "subset in a tensor",
        "weighted",
        "list",
        "tuple",
        "array",
        "range",
        "in order",
        "shard of fewer",
        "shard of a subset",
        "shard of a list",
        "shuffled",
        "shuffled, fewer",
        "accelerate's",
        "shard",
        "shard of shuffled",
        "by length",
    ],
)
@pytest.mark.parametrize(
    "load",
    [
        loader,
        lambda sampler: DataLoader(DATA, batch_sampler=BatchSampler(sampler, 4, False), collate_fn=list),
        lambda sampler: DataLoader(DATA, batch_sampler=BatchSamplerShard(BatchSampler(sampler, 4, True), 2), collate_fn=list),
        lambda sampler: DataLoader(DATA, batch_sampler=SkipBatchSampler(BatchSampler(sampler, 4, True), 1), collate_fn=list),
    ],
    ids=["sampler", "batches", "accelerate's shards", "accelerate's rest of an epoch"],
)
def test_rows_are_those_that_the_sampler_can_draw(
    load: Callable[[Any], Any], make: Callable[[], Any], expected: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    assert {int(row) for row in rows_drawn(load(make()))} == expected
    assert not caplog.records


def test_a_list_of_batches_has_the_rows_in_them() -> None:
    assert rows_drawn(DataLoader(DATA, batch_sampler=[[2, 3], [5, 7]], collate_fn=list)) == {2, 3, 5, 7}


def test_keys_need_not_be_numbers() -> None:
    named: Any = {f"row {row}": row for row in DATA}
    keys = [f"row {row}" for row in SOME]
    assert rows_drawn(DataLoader(named, batch_size=4, sampler=keys, collate_fn=list)) == set(SOME)


@pytest.mark.parametrize("shuffle", [True, False])
def test_without_a_restriction_the_rows_are_what_they_were(shuffle: bool) -> None:
    own = probes_from_loader(DataLoader(DATA, batch_size=4, shuffle=shuffle, collate_fn=list), **SIZES)
    assert own is not None
    assert contents(own) == contents(DatasetProbes(DATA, list, **SIZES)) == [[10, 4, 12], [1, 2, 13]]


def test_a_plain_loop_has_the_same_rows() -> None:
    found = as_probes(loader(SubsetRandomSampler(SOME)), **SIZES)
    assert {row for seed in range(40) for batch in found.draw(seed) or () for row in batch.content} == set(SOME)


def test_a_sampler_without_rows_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the sampler of the data draws no row"):
        probes_from_loader(loader(SubsetRandomSampler([])), **SIZES)


class Unknown(Sampler[int]):
    """Not to be iterated."""

    def __init__(self, length: int | None) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("iterated")

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("endless")
        return self.length


class UnknownBatches(Unknown):
    batch_size = 4


def batches(sampler: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_sampler=sampler, collate_fn=list)


@pytest.mark.parametrize(
    ("make", "warns"),
    [
        (lambda: loader(Unknown(20)), False),
        (lambda: loader(Unknown(25)), False),
        (lambda: loader(Unknown(None)), False),
        (lambda: loader(Unknown(19)), True),
        (lambda: loader(sharded(Unknown(19))), True),
        (lambda: batches(BatchSampler(Unknown(19), 4, False)), True),
        (lambda: batches(UnknownBatches(5)), False),
        (lambda: batches(UnknownBatches(4)), True),
        (lambda: batches(Unknown(4)), False),
    ],
    ids=[
        "all",
        "more",
        "endless",
        "fewer",
        "sharded",
        "in batches",
        "all batches",
        "fewer batches",
        "batches of no known size",
    ],
)
def test_an_unknown_sampler_is_not_iterated_and_said_to_be_so(
    make: Callable[[], Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "curvature_callbacks"):
        assert rows_drawn(make()) == ALL
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warns
    assert all("`probe_dataset=` or `probe_dataloader=`" in message and "`Unknown" in message for message in said)


class Rank:
    """As much of a world as a draw looks at."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 30])
def test_every_process_has_a_row(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in range(4):
        monkeypatch.setattr(dataset, "current_world", lambda rank=rank: Rank(rank, 4))
        own = DatasetProbes(list(range(num_rows)), list, **SIZES).draw(0)
        found.append([row for batch in own for row in batch.content])
    assert all(found)
    together = [row for rows in found for row in rows]
    assert len(set(together)) == min(num_rows, 24)
    assert len(together) == max(4, min(num_rows, 24)), "none twice, where there are enough"


def test_one_process_says_what_is_not_known(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(samplers, "current_world", lambda: Rank(1, 2))
    assert rows_drawn(loader(Unknown(5))) == ALL
    assert not caplog.records


class Filtering:
    """Keeps rows of at least `least`, and makes None of a batch without any."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, rows: list[int]) -> list[int] | None:
        return [row for row in rows if row >= self.least] or None


def test_microbatches_that_the_collator_makes_none_of_are_left_out() -> None:
    prepared: list[Any] = []
    found = DatasetProbes(DATA, Filtering(13), prepare=lambda batch: prepared.append(batch) or batch, **SIZES)
    assert contents(found) == [[13]] == prepared


def test_a_probe_of_none_but_these_says_so() -> None:
    with pytest.raises(ProbeError, match="the collator returned None for each microbatch of a probe, 6 rows in all"):
        DatasetProbes(DATA, Filtering(20), **SIZES).draw(0)


def test_training_is_refused_before_it_begins_where_none_is_left() -> None:
    source: Any = DataLoader(DATA, batch_size=4, collate_fn=Filtering(20))
    monitor = CurvatureMonitor(torch.nn.Linear(1, 1), probes=source, loss="mse")
    with pytest.raises(ConfigurationError, match="the collator returned None for each microbatch"):
        monitor.check()
