"""Whole batches for losses that couple the rows of one: of the size of training, from every source."""

from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

import curvature_callbacks.probes.dataset as probes_of_datasets
from curvature_callbacks import CapturedProbes, DatasetProbes, FixedProbes
from curvature_callbacks.probes import probes_from_loader
from curvature_callbacks.probes.batch_sizes import training_batch_size
from tests.training_cases import Rows, Stream

SIZES = {"num_microbatches": 2, "microbatch_size": 3}


def whole_rows(num_rows: int, batch_size: int | None, *, seed: int = 0) -> list[list[int]]:
    probes = DatasetProbes(list(range(num_rows)), torch.tensor, **SIZES, batch_size=batch_size)
    return [batch.content.tolist() for batch in probes.draw_whole(seed)]


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "sizes"),
    [
        (40, 16, [16]),  # more than a probe has: one batch of them
        (40, 2, [2, 2, 2]),
        (40, 4, [4]),
        (40, None, [6]),  # of a size that is not known: all rows of a probe
        (10, 16, [10]),  # training has no larger one either
        (5, 3, [3]),  # no batch that is not full
    ],
)
def test_as_many_whole_batches_as_a_probe_has_rows_for(num_rows: int, batch_size: int | None, sizes: list[int]) -> None:
    batches = whole_rows(num_rows, batch_size)
    assert list(map(len, batches)) == sizes
    assert len({row for batch in batches for row in batch}) == sum(sizes)
    assert batches == whole_rows(num_rows, batch_size)
    assert num_rows < 40 or batches != whole_rows(num_rows, batch_size, seed=1)


def test_every_process_has_a_whole_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_rank(rank: int) -> list[list[int]]:
        world: Any = type("World", (), {"rank": rank, "size": 2})
        monkeypatch.setattr(probes_of_datasets, "current_world", lambda: world)
        return whole_rows(9, 16)

    first, second = of_rank(0)[0], of_rank(1)[0]
    assert len(first) == len(second) == 4  # nine rows do not give a batch of five to both
    assert not {*first} & {*second}


class Bucketed(BatchSampler):
    """Of a class that tells no size."""

    def __init__(self) -> None:
        self.lengths = 8

    def __len__(self) -> int:
        return self.lengths


ROWS = Rows()
LOADERS: dict[str, tuple[Any, int | None]] = {
    "plain": (lambda: DataLoader(ROWS, batch_size=5), 5),
    "a stream": (lambda: DataLoader(Stream([0]), batch_size=5), 5),
    "a sampler of batches": (lambda: DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 4, drop_last=True)), 4),
    "a list of batches": (lambda: DataLoader(ROWS, batch_sampler=[[0, 1], [2, 3, 4], [5, 6, 7]]), 3),
    "a part of every batch": (
        lambda: DataLoader(
            ROWS,
            batch_sampler=BatchSamplerShard(BatchSampler(SequentialSampler(ROWS), 6, False), 2, 0, split_batches=True),  # type: ignore[arg-type]
        ),
        3,
    ),
    "every second batch": (
        lambda: DataLoader(ROWS, batch_sampler=BatchSamplerShard(BatchSampler(SequentialSampler(ROWS), 6, False), 2, 0)),  # type: ignore[arg-type]
        6,
    ),
    "no size told": (lambda: DataLoader(ROWS, batch_sampler=Bucketed()), round(len(ROWS) / 8)),
    "no batches": (lambda: DataLoader(ROWS, batch_size=None), None),
    "no loader": (lambda: object(), None),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_size_of_a_training_batch_is_known_from_its_loader(name: str) -> None:
    make, size = LOADERS[name]
    assert training_batch_size(make()) == size


def test_probes_of_a_loader_have_its_batch_size_unless_another_is_the_one_of_training() -> None:
    loader = DataLoader(ROWS, batch_size=5)
    for given, size in ((None, 5), (4, 4)):
        probes = probes_from_loader(loader, **SIZES, batch_size=given)
        assert probes is not None
        assert [batch.num_rows for batch in probes.draw_whole(0)] == [size]


def test_captured_batches_are_kept_whole_unless_that_is_not_wanted() -> None:
    probes = CapturedProbes(**SIZES)
    batches = [torch.arange(start, start + 8) for start in (0, 10, 20)]
    probes.offer(batches[0], whole=False)
    assert probes.draw_whole(0) is None
    for batch in batches[1:]:
        probes.offer(batch)
    assert [batch.content.tolist() for batch in probes.draw_whole(0) or []] == [batches[2].tolist()]
    assert [batch.num_rows for batch in probes.draw(0) or []] == [3, 3]
    batches[2] += 100
    assert (probes.draw_whole(0) or [])[0].content[0] == 20


def test_small_captured_batches_are_kept_until_they_have_the_rows_of_a_probe() -> None:
    probes = CapturedProbes(num_microbatches=4, microbatch_size=3)
    for start in range(5):
        probes.offer(torch.arange(start, start + 4))
    assert [batch.content[0].item() for batch in probes.draw_whole(0) or []] == [2, 3, 4]


def test_given_batches_are_whole() -> None:
    batches = [torch.arange(4), torch.arange(7)]
    assert FixedProbes(batches).draw_whole(0) == batches
