"""Packed rows through the callback: numbers are those of the sequences, or a row is what it is and said to be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer

from curvature_callbacks import FisherSpectrum, Record, TopEigenpairs, compute_fisher_spectrum
from curvature_callbacks.transformers import CurvatureCallback
from tests.reference import fisher_eigenvalues, float64_copy, gradients_of, largest_of_hessian, stacked
from tests.transformers_runs import training_arguments

MEASURE = [FisherSpectrum(), TopEigenpairs(k=1, which="LA", tol=1e-5, max_matvecs=200)]


def sequences() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 9, (8,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 20, (length,), generator=generator).tolist()} for length in lengths]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from sequences()


def language_model(*, use_cache: bool = False) -> nn.Module:
    """With a cache, which the Trainer turns off, its attention goes on from one sequence of a row to the next."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=use_cache))


def probed(directory: Path, collator: Any, data: Any = None, **options: Any) -> dict[str, Record]:
    """The records of the one probe, all rows of the data measured."""
    watch = {"every_n_steps": 5, "measure": MEASURE, "num_microbatches": 1, "microbatch_size": 8}
    callback = CurvatureCallback(**(watch | options))
    arguments = training_arguments(directory, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0)
    data = sequences() if data is None else data
    Trainer(model=language_model(), args=arguments, train_dataset=data, data_collator=collator, callbacks=[callback]).train()
    return {record.measurement: record for record in callback.history if record.block is None}


class Kept:
    """Keeps what the probe's loss is called with."""

    name = "kept"

    def init(self, problem: Any) -> None:
        return None

    def measure(self, problem: Any, state: None) -> Any:
        self.contents = [microbatch.content for microbatch in problem.microbatches]
        return [Record(step=problem.step, measurement=self.name, scalars={})], None


def of_sequence(row: dict[str, list[int]]) -> Any:
    ids = torch.tensor([row["input_ids"]])
    return lambda model: model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)


@pytest.mark.parametrize("data", [None, Stream()], ids=["rows", "stream"])
def test_numbers_are_those_of_single_sequences(data: Any, tmp_path: Path) -> None:
    records = probed(tmp_path, DataCollatorWithFlattening(), data)
    assert not any(record.failed for record in records.values()), [record.error for record in records.values()]
    assert records["probe"].scalars["rows"] == 8
    model, losses = language_model(), [of_sequence(row) for row in sequences()]
    expected = fisher_eigenvalues(stacked(gradients_of(model, losses)))
    found = torch.tensor(records["empirical_fisher"].arrays["full_eigenvalues"])
    assert torch.allclose(found[:6].double(), expected[:6], rtol=1e-3)
    num_targets = sum(len(row["input_ids"]) - 1 for row in sequences())

    def mean(model: nn.Module) -> Tensor:
        return torch.stack([loss(model) for loss in losses]).sum() / num_targets

    expected = largest_of_hessian(float64_copy(model), mean)
    assert records["hessian"].scalars["lambda_max"] == pytest.approx(expected, rel=1e-3)
    assert all(records[name].metadata["packing"] == "sequences" for name in ("empirical_fisher", "hessian"))


def joining(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Packs, and lets every sequence predict the first token of the next."""
    batch = dict(DataCollatorWithFlattening()(rows))
    return batch | {"labels": batch["input_ids"].clone()}


def test_a_row_whose_loss_is_not_that_of_its_sequences_is_one_sample(tmp_path: Path, caplog: Any) -> None:
    kept = Kept()
    records = probed(tmp_path, joining, measure=[*MEASURE, kept])
    assert "a sample of Fishers and Grams is a packed row" in caplog.text
    assert records["probe"].scalars["rows"] == 1
    assert "a single row" in str(records["empirical_fisher"].error)
    assert records["hessian"].metadata["packing"] == "packed rows"
    model, (batch,) = language_model(), kept.contents
    expected = largest_of_hessian(float64_copy(model), lambda model: model(**batch).loss)
    assert records["hessian"].scalars["lambda_max"] == pytest.approx(expected, rel=1e-3)


def test_packed_batches_in_one_call() -> None:
    model, batch = language_model(), dict(DataCollatorWithFlattening()(sequences()))
    expected = stacked(gradients_of(model, [of_sequence(row) for row in sequences()])).square().sum() / 8
    found = compute_fisher_spectrum(model, [batch], block_structure="none").full
    assert found.num_samples == 8
    assert found.metrics()["trace"] == pytest.approx(float(expected), rel=1e-4)


def test_attention_that_goes_on_to_the_next_sequence_is_seen_by_the_gradient() -> None:
    """Losses are 1e-5 apart and Hessian products a quarter."""
    model = language_model(use_cache=True)
    batches = [dict(DataCollatorWithFlattening()(sequences()[start : start + 4])) for start in (0, 4)]
    totals = [lambda model, batch=batch: model(**batch).loss * int((batch["labels"] != -100).sum()) for batch in batches]
    expected = stacked(gradients_of(model, totals)).square().sum() / 2
    found = compute_fisher_spectrum(model, batches, block_structure="none").full
    assert found.num_samples == 2
    assert found.metrics()["trace"] == pytest.approx(float(expected), rel=1e-4)
