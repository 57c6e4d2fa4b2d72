"""Where microbatches come from: the right rows, the same for the same seed, and no source any the wiser."""

import copy
import random
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from curvature_callbacks import CapturedProbes, ConfigurationError, DatasetProbes, FixedProbes, Probes
from curvature_callbacks.probes import probes_from_loader, stable_seed
from tests.training_cases import AugmentedRows, Rows, Stream, assert_equal
from tests.transformers_runs import MaskingCollator, Sentences

SIZES = {"num_microbatches": 2, "microbatch_size": 3}


def numbered(num_rows: int = 20, **changes: Any) -> DatasetProbes:
    """Probes whose rows are their own indices."""
    return DatasetProbes(list(range(num_rows)), torch.tensor, **(SIZES | changes))


def indices(batches: Any) -> list[int]:
    return torch.cat([batch.content for batch in batches]).tolist()


def test_rows_come_in_microbatches_of_the_size_asked_for() -> None:
    assert [batch.num_rows for batch in numbered().draw(0)] == [3, 3]


def test_rows_of_a_probe_are_distinct() -> None:
    assert all(len(set(indices(numbered().draw(seed)))) == 6 for seed in range(50))


def test_every_row_is_drawn_equally_often() -> None:
    counts = np.bincount([i for seed in range(2000) for i in indices(numbered().draw(seed))], minlength=20)
    expected = 2000 * 6 / 20
    assert (abs(counts - expected) < 5 * expected**0.5).all()  # five standard deviations


def test_the_seed_determines_the_rows() -> None:
    assert indices(numbered().draw(7)) == indices(numbered().draw(7))
    assert indices(numbered().draw(7)) != indices(numbered().draw(8))


@pytest.mark.parametrize(("num_rows", "sizes"), [(1, [1]), (4, [3, 1]), (6, [3, 3])])
def test_a_small_dataset_gives_what_it_has(num_rows: int, sizes: list[int]) -> None:
    batches = numbered(num_rows).draw(0)
    assert [batch.num_rows for batch in batches] == sizes
    assert sorted(indices(batches)) == list(range(num_rows))


def test_seeds_are_equal_in_every_process_and_version() -> None:
    assert stable_seed(0, 40) == 2873307109553384493
    assert stable_seed(1, "fixed") == 1092678363101248166


def test_seeds_differ_and_fit_every_generator() -> None:
    seeds = {stable_seed(seed, step) for seed in range(20) for step in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_dataset_that_fetches_rows_together_is_asked_once() -> None:
    class Batched(Rows):
        asked: list[list[int]] = []  # noqa: RUF012

        def __getitems__(self, rows: list[int]) -> list[Any]:
            self.asked.append(rows)
            return [self[row] for row in rows]

    data = Batched()
    probes_from_loader(DataLoader(data, batch_size=4), **SIZES).draw(0)  # type: ignore[union-attr]
    assert [len(rows) for rows in data.asked] == [3, 3]


def test_a_prepared_batch_is_what_is_measured() -> None:
    assert indices(numbered(prepare=lambda batch: batch + 100).draw(0)) == [i + 100 for i in indices(numbered().draw(0))]


def draws(data: AugmentedRows) -> Any:
    """What the dataset's own generators give next."""
    nested = data.nested
    return [
        torch.rand(2, generator=data.generator).tolist(),
        data.numpy.random(2).tolist(),
        nested["python"].random(),
        nested["legacy"].rand(),
    ]


def test_generators_of_the_dataset_are_put_back() -> None:
    data = AugmentedRows()
    expected = draws(copy.deepcopy(data))
    probes_from_loader(DataLoader(data, batch_size=4), **SIZES).draw(0)  # type: ignore[union-attr]
    assert draws(data) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: Subset(data, range(20)),
        lambda data: ConcatDataset([data, Rows()]),
        lambda data: Subset(Subset(data, range(20)), range(10)),
        lambda data: Subset(ConcatDataset([Subset(data, range(20))]), range(10)),
    ],
    ids=["subset", "concatenation", "subset of subset", "subset of concatenation of subset"],
)
def test_generators_of_wrapped_datasets_are_put_back(wrap: Any) -> None:
    data = AugmentedRows()
    expected = draws(copy.deepcopy(data))
    probes_from_loader(DataLoader(wrap(data), batch_size=4), **SIZES).draw(0)  # type: ignore[union-attr]
    assert draws(data) == expected


def test_generators_are_put_back_when_a_row_cannot_be_read() -> None:
    class Broken(AugmentedRows):
        def __getitem__(self, index: int) -> Any:
            super().__getitem__(index)
            raise OSError("disk")

    data = Broken()
    expected = draws(copy.deepcopy(data))
    probes = probes_from_loader(DataLoader(data, batch_size=4), **SIZES)
    with pytest.raises(OSError, match="disk"):
        probes.draw(0)  # type: ignore[union-attr]
    assert draws(data) == expected


def test_generators_with_slots_are_put_back() -> None:
    class Slotted:
        __slots__ = ("generator",)

        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __call__(self, x: Any) -> Any:
            return x + torch.rand(6, generator=self.generator)

    class Transformed(Rows):
        transform = Slotted()

        def __init__(self) -> None:
            super().__init__()
            self.transform = Slotted()

        def __getitem__(self, index: int) -> Any:
            return self.transform(self.x[index]), self.y[index]

    data = Transformed()
    before = data.transform.generator.get_state()
    probes_from_loader(DataLoader(data, batch_size=4), **SIZES).draw(0)  # type: ignore[union-attr]
    assert torch.equal(before, data.transform.generator.get_state())


@pytest.mark.parametrize("used", [False, True], ids=["not yet made", "in use"])
def test_generators_of_the_collator_are_put_back(used: bool) -> None:
    collate = MaskingCollator()
    rows = [Sentences()[0], Sentences()[1]]
    if used:
        collate(rows)
    expected = copy.deepcopy(collate)(rows)
    probes_from_loader(DataLoader(Sentences(), batch_size=4, collate_fn=collate), **SIZES).draw(0)  # type: ignore[union-attr]
    assert_equal(collate(rows), expected)


def test_the_loader_is_not_iterated() -> None:
    class Untouchable(DataLoader[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("iterated")

    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    probes = probes_from_loader(Untouchable(Rows(), batch_size=4, shuffle=True, generator=generator), **SIZES)
    assert len(probes.draw(0)) == 2  # type: ignore[union-attr]
    assert torch.equal(before, generator.get_state())


def test_drawing_rows_moves_no_global_generator_by_itself() -> None:
    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    numbered().draw(0)
    assert_equal(before, (torch.get_rng_state(), np.random.get_state(), random.getstate()))


@pytest.mark.parametrize(
    "source",
    [
        DataLoader(Stream(Rows()), batch_size=4),
        DataLoader(Rows(), batch_size=None),
        {"a": DataLoader(Rows())},
        [DataLoader(Rows())],
        iter([torch.ones(2)]),
        None,
    ],
    ids=["stream", "no collation", "mapping", "list", "iterator", "nothing"],
)
def test_what_cannot_be_indexed_is_recognised(source: Any) -> None:
    assert probes_from_loader(source, **SIZES) is None


def test_an_empty_dataset_is_refused() -> None:
    empty = TensorDataset(torch.zeros(0, 2))
    with pytest.raises(ConfigurationError, match="the dataset is empty"):
        probes_from_loader(DataLoader(empty, batch_size=2), **SIZES)


def test_captured_probes_are_the_latest_batches_oldest_first() -> None:
    probes = CapturedProbes(**SIZES)
    assert probes.draw(0) is None
    for i in range(4):
        probes.offer(torch.full((5, 2), float(i)))
    kept = probes.draw(0)
    assert [batch.content[0, 0].item() for batch in kept] == [2.0, 3.0]  # type: ignore[union-attr]
    assert [batch.num_rows for batch in kept] == [3, 3]  # type: ignore[union-attr]


def test_captured_probes_are_copies() -> None:
    probes, batch = CapturedProbes(**SIZES), {"x": torch.ones(2, 2, requires_grad=True), "ids": ["a", "b"]}
    probes.offer(batch)
    with torch.no_grad():
        batch["x"].zero_()  # type: ignore[attr-defined]
    (kept,) = (microbatch.content for microbatch in probes.draw(0))  # type: ignore[union-attr]
    assert kept["x"].sum() == 4
    assert not kept["x"].requires_grad
    assert kept["ids"] == ["a", "b"]


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "batch",
    [(torch.ones(5, 2), torch.ones(5)), [torch.ones(5), {"y": torch.ones(5)}], Pair(torch.ones(5, 2), torch.ones(5))],
    ids=["tuple", "nested", "namedtuple"],
)
def test_captured_batches_keep_their_structure(batch: Any) -> None:
    probes = CapturedProbes(**SIZES)
    probes.offer(batch)
    (kept,) = (microbatch.content for microbatch in probes.draw(0))  # type: ignore[union-attr]
    assert type(kept) is type(batch)
    assert len(kept[0]) == 3


def test_fixed_probes_are_what_was_given() -> None:
    batches = [torch.ones(2), torch.zeros(2)]
    assert [id(batch) for batch in FixedProbes(batches).draw(1)] == [id(batch) for batch in batches]


@pytest.mark.parametrize("probes", [numbered(), FixedProbes([torch.ones(1)]), CapturedProbes(**SIZES)])
def test_all_are_probes(probes: Any) -> None:
    assert isinstance(probes, Probes)


class LazyFile(Dataset[Any]):
    """Opens its file at the first access and counts, as data sets over archives do."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.reads = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        self.handle = self.handle or object()
        self.reads += 1
        return torch.tensor([float(index)])


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(8))], ids=["bare", "subset"])
def test_what_a_data_set_opened_for_a_draw_is_not_left_open(wrap: Any) -> None:
    data = LazyFile()
    probes = DatasetProbes(wrap(data), torch.stack, num_microbatches=2, microbatch_size=3)
    assert sum(microbatch.num_rows for microbatch in probes.draw(0)) == 6
    assert (data.handle, data.reads) == (None, 0)


def test_pairs_of_a_stream_stay_whole() -> None:
    """`[chosen; rejected]`, eight rows read in sixteen: the first eight alone would be chosen against chosen."""
    probes = CapturedProbes(num_microbatches=2, microbatch_size=4, batch_size=8)
    for num_pairs in (8, 4):  # the last batch of a stream is short
        probes.offer({"x": torch.arange(2 * num_pairs)})
    kept = probes.draw(0)
    assert kept is not None
    assert [(batch.num_rows, len(batch["x"]), batch.is_whole) for batch in kept] == [(8, 16, True), (4, 8, True)]


def test_rows_of_a_stream_are_cut_where_they_are_those_that_were_read() -> None:
    probes = CapturedProbes(num_microbatches=3, microbatch_size=4, batch_size=8)
    probes.offer({"x": torch.arange(3)})  # it may be of three rows, or of one and a half pairs
    probes.offer({"x": torch.arange(8)})
    probes.offer({"x": torch.arange(5)})
    kept = probes.draw(0)
    assert kept is not None
    assert [(batch.num_rows, batch.is_whole) for batch in kept] == [(3, True), (4, False), (4, False)]


def test_a_batch_that_does_not_tell_its_rows_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    probes, told = CapturedProbes(**SIZES), CapturedProbes(**SIZES, batch_size=4)
    for _ in range(2):
        probes.offer(object())
    told.offer(object())
    assert probes.draw(0) is None
    assert [batch.num_rows for batch in told.draw(0) or ()] == [4]
    assert ["which do not tell how many rows they have" in each.getMessage() for each in caplog.records] == [True]
