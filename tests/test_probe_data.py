"""Data of one's own to measure on, and sequences that are cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from curvature_callbacks import ConfigurationError, FisherSpectrum
from curvature_callbacks.batches import cut_sequences
from curvature_callbacks.lightning.callback import CurvatureCallback as LightningCallback
from curvature_callbacks.record import Record
from curvature_callbacks.transformers.callback import CurvatureCallback as TransformersCallback
from tests.lightning_runs import LIGHTNING_WARNINGS, lightning_run, pair_loss
from tests.training_cases import Rows, Stream, callback_options, loader
from tests.transformers_runs import Sentences, transformers_run

pytestmark = LIGHTNING_WARNINGS


class Noted(Rows):
    """Knows who asked for its rows."""

    def __init__(self) -> None:
        super().__init__(7)
        self.asked: set[int] = set()

    def __getitem__(self, index: int) -> Any:
        self.asked.add(index)
        return super().__getitem__(index)


class NotedSentences(Sentences):
    def __init__(self) -> None:
        super().__init__(7)
        self.asked: set[int] = set()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked.add(index)
        return super().__getitem__(index)


def rows_of(records: list[Record]) -> set[float]:
    return {record.scalars["rows"] for record in records if record.measurement == "probe"}


def whole_models(records: list[Record]) -> list[Record]:
    return [record for record in records if record.measurement == "empirical_fisher" and record.block is None]


def lightning(directory: Path, **changes: Any) -> list[Record]:
    return lightning_run(directory, LightningCallback(**callback_options(loss_fn=pair_loss, **changes)), max_steps=3).records


def transformers(directory: Path, **changes: Any) -> list[Record]:
    return transformers_run(directory, TransformersCallback(**callback_options(**changes)), max_steps=3).records


RUNS = [(lightning, Noted), (transformers, NotedSentences)]


@pytest.mark.parametrize("argument", ["probe_dataset", "probe_dataloader"])
@pytest.mark.parametrize(("run", "kind"), RUNS, ids=["lightning", "transformers"])
def test_rows_come_from_the_data_named(run: Callable[..., list[Record]], kind: type, argument: str, tmp_path: Path) -> None:
    data = kind()
    given = data if argument == "probe_dataset" else DataLoader(data, batch_size=2)
    records = run(tmp_path, num_microbatches=3, microbatch_size=3, **{argument: given})
    assert rows_of(records) == {7.0}, "all there are"
    # What a data set keeps is put back after a probe, so that a set that only counts has counted nothing.
    assert not data.asked or data.asked == set(range(7))
    assert not [record.error for record in records if record.failed]


def test_they_are_other_numbers_than_those_of_the_training_data(tmp_path: Path) -> None:
    own = TensorDataset(torch.full((5, 6), 3.0), torch.zeros(5, dtype=torch.int64))
    spectrum = {"measure": [FisherSpectrum()]}
    named, training = lightning(tmp_path, probe_dataset=own, **spectrum), lightning(tmp_path, **spectrum)
    ranks = [{record.scalars["full_rank"] for record in whole_models(records)} for records in (named, training)]
    assert ranks[0] == {1.0}, "all rows are the same"
    assert min(ranks[1]) > 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"probe_dataset": Rows(), "probe_dataloader": loader()}, "both say what to measure on"),
        ({"probe_dataset": Stream(Rows())}, "`probe_dataset` must have `__getitem__` and `__len__`"),
        ({"probe_dataset": Rows(0)}, "the dataset is empty"),
        (
            {"probe_dataloader": loader(Stream(Rows()), shuffle=False)},
            "`probe_dataloader` must be a DataLoader",
        ),
        ({"max_sequence_length": 0}, "`max_sequence_length` must be an integer of at least 1"),
        ({"max_sequence_length": 3}, "no mapping with `input_ids`"),
    ],
)
def test_what_cannot_be_measured_on_is_refused_before_training(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=match):
        lightning(tmp_path, **changes)


def test_everything_as_long_as_the_tokens_is_cut() -> None:
    batch = {
        "input_ids": torch.arange(12).view(2, 6),
        "labels": torch.arange(12).view(2, 6) + 1,
        "attention_mask": torch.ones(2, 6, 6),
        "image": torch.zeros(2, 3, 6),
        "class": torch.zeros(2),
        "name": "rows",
    }
    cut = cut_sequences(batch, 4)
    assert cut["input_ids"].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert cut["labels"].tolist() == [[1, 2, 3, 4], [7, 8, 9, 10]]
    assert cut["attention_mask"].shape == (2, 4, 6)
    assert cut["image"].shape == (2, 3, 6)
    assert cut["class"].shape == (2,)
    assert cut["name"] == "rows"
    assert batch["input_ids"].shape == (2, 6), "the batch itself stays"


def test_short_sequences_stay_as_they_are() -> None:
    batch = {"input_ids": torch.arange(6).view(1, 6)}
    assert torch.equal(cut_sequences(batch, 9)["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("data", [Sentences, lambda: Stream(Sentences())], ids=["rows", "stream"])
def test_probes_of_a_run_have_fewer_targets(data: Callable[[], Any], tmp_path: Path) -> None:
    def found(**changes: Any) -> list[Record]:
        callback = TransformersCallback(**callback_options(measure=[FisherSpectrum()], **changes))
        return whole_models(transformers_run(tmp_path, callback, data=data, max_steps=3).records)

    whole, cut = found(), found(max_sequence_length=3)
    for record, shorter in zip(whole, cut, strict=True):
        assert shorter.metadata["num_targets"] == 2 * shorter.scalars["full_num_samples"], "three tokens have two targets"
        assert record.metadata["num_targets"] > shorter.metadata["num_targets"]
