"""Whether packed rows are taken apart is decided by their loss, once, and holds for the run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import FisherSpectrum, TopEigenpairs
from tests.reference import largest_of_hessian
from tests.run.monitor_cases import new_monitor

TOP = TopEigenpairs(k=1, which="LA", tol=1e-6, max_matvecs=120)


class Running(nn.Module):
    """Its state goes on from position to position, across the borders of sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids).cumsum(1))


def over_labels(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def over_rows(model: nn.Module, batch: Any) -> Tensor:
    """(N,) means over the labels of each row; of a row without one not a number."""
    losses = F.cross_entropy(model(batch["input_ids"]).mT, batch["labels"], reduction="none")
    return losses.sum(1) / (batch["labels"] != -100).sum(1)


def packed(*lengths: int, rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1).clone()
    ids = torch.randint(9, positions.shape, generator=generator)
    return {"input_ids": ids, "labels": torch.randint(9, ids.shape, generator=generator), "position_ids": positions}


WASTEFUL, PLAIN = packed(20, *[1] * 12), packed(3, 3, 3, rows=2, seed=1)


def top_of(batches: list[Any]) -> float:
    model = Running().double()
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]

    def mean(replica: nn.Module) -> Tensor:
        totals = [over_labels(replica, batch) * count for batch, count in zip(batches, counts, strict=True)]
        return torch.stack(totals).sum() / sum(counts)

    return largest_of_hessian(model, mean)


@pytest.mark.parametrize("batches", [[WASTEFUL, PLAIN], [PLAIN, WASTEFUL]], ids=["much padding first", "last"])
def test_sequences_that_would_be_padding_for_the_most_part_are_compared_as_well(batches: list[Any], caplog: Any) -> None:
    monitor = new_monitor(Running(), probes=batches, loss=over_labels, measure=[TOP], when=1)
    monitor.check()
    hessian = next(record for record in monitor.step(0) if record.measurement == "hessian")
    assert hessian.metadata["packing"] == "packed rows"
    assert caplog.text.count("a sample of Fishers and Grams is a packed row") == 1
    rows_alike = [PLAIN["labels"].numel(), WASTEFUL["labels"].numel()]
    assert rows_alike == [18, 32]


def test_what_was_decided_holds_after_memory_ran_out() -> None:
    """Small pieces of packed rows are packed rows too."""
    monitor = new_monitor(Running(), probes=[PLAIN], loss=over_labels, measure=[TOP], when=1, draw="fixed")
    first = next(record for record in monitor.step(0) if record.measurement == "hessian")
    monitor._probing._memory.row_limit = 1
    later = next(record for record in monitor.step(1) if record.measurement == "hessian")
    assert first.scalars["lambda_max"] == pytest.approx(top_of([PLAIN]), rel=1e-4)
    assert later.scalars["lambda_max"] == pytest.approx(first.scalars["lambda_max"], rel=1e-4)


def test_a_sequence_without_a_label_leaves_its_row_as_it_is() -> None:
    """Its own loss is not a number, that of the row is."""
    batch = packed(3, 3, rows=4)
    batch["labels"][0, :3] = -100
    monitor = new_monitor(Running(), probes=[batch], loss=over_rows, measure=[FisherSpectrum(), TOP], when=1)
    records = {record.measurement: record for record in monitor.step(0) if record.block is None}
    assert not any(record.failed for record in records.values())
    assert records["empirical_fisher"].scalars["full_num_samples"] == 4
    model = Running().double()
    expected = largest_of_hessian(model, lambda replica: over_rows(replica, batch).mean())
    assert records["hessian"].scalars["lambda_max"] == pytest.approx(expected, rel=1e-4)
