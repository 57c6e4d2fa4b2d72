"""Rows of microbatches: counted as drawn, taken apart where their layout is known or they can be collated anew, else whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from curvature_callbacks import (
    CapturedProbes,
    ConfigurationError,
    CurvatureMonitor,
    DatasetProbes,
    FisherSpectrum,
    Microbatch,
    Record,
    RefusedError,
    TopEigenpairs,
    compute_spectrum,
)
from curvature_callbacks.layout import counted_rows, has_one_row_each
from curvature_callbacks.microbatch import as_microbatch, at_most
from curvature_callbacks.operators.hessian import HessianOperator

P = 5


def of(records: list[Record], name: str) -> Record:
    """The model-wide record of one measurement."""
    (record,) = [each for each in records if each.measurement == name and each.block is None]
    return record


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LENGTHS = (3, 9, 4, 7, 2, 8)
SEQUENCES = [(torch.randn(length, P, generator=generator(i)), i % 3) for i, length in enumerate(LENGTHS)]
PAIRS = [(torch.randn(P, generator=generator(i)), torch.randn(P, generator=generator(50 + i))) for i in range(6)]


def net(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(P, outputs)


def ragged(rows: list[Any]) -> Any:
    return [x for x, _ in rows], torch.tensor([y for _, y in rows])


def packed(rows: list[Any]) -> Any:
    return {"x": pack_sequence([x for x, _ in rows], enforce_sorted=False), "y": torch.tensor([y for _, y in rows])}


def of_images(rows: list[Any]) -> Any:
    """As detectors take them: a target of its own for each row."""
    return {"x": torch.stack([x.mean(0) for x, _ in rows]), "labels": [{"y": torch.tensor([y])} for _, y in rows]}


def test_rows_of_several_loaders_are_those_they_agree_on() -> None:
    """Inputs and targets in a list are of different kinds, so that it has not one entry a row."""
    x, y = torch.ones(4, 6), torch.ones(4, dtype=torch.int64)
    assert counted_rows({"a": [x, y], "b": [x, y]}) == 4
    assert has_one_row_each({"a": [x, y], "b": [x, y]}, 4)
    assert counted_rows({"a": [x, y], "b": [x[:3], y[:3]]}) is None
    assert not has_one_row_each({"a": [x, x, x, x], "y": y}, 4)  # one tensor a row, or four of all


def paired(rows: list[Any]) -> Any:
    return {"x": torch.cat([torch.stack([one for one, _ in rows]), torch.stack([other for _, other in rows])])}


def loss_of_ragged(model: nn.Module, batch: Any) -> Tensor:
    xs, y = batch
    return F.cross_entropy(torch.stack([model(x).tanh().mean(0) for x in xs]), y)


def loss_of_packed(model: nn.Module, batch: Any) -> Tensor:
    x, lengths = nn.utils.rnn.pad_packed_sequence(batch["x"])
    kept = (torch.arange(len(x))[:, None] < lengths)[..., None]
    return F.cross_entropy((model(x).tanh() * kept).sum(0) / lengths[:, None], batch["y"])


def loss_of_images(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), torch.cat([target["y"] for target in batch["labels"]]))


def loss_of_pairs(model: nn.Module, batch: Any) -> Tensor:
    chosen, rejected = model(batch["x"]).tanh().sum(1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


CASES: dict[str, tuple[list[Any], Callable[..., Any], Callable[..., Tensor]]] = {
    "ragged list": (SEQUENCES, ragged, loss_of_ragged),
    "packed sequence": (SEQUENCES, packed, loss_of_packed),
    "packed sequence, targets first": (SEQUENCES, lambda rows: dict(reversed(packed(rows).items())), loss_of_packed),
    "a target of tensors a row": (SEQUENCES, of_images, loss_of_images),
    "pairs": (PAIRS, paired, loss_of_pairs),
}


def dense(model: nn.Module, mean: Callable[[], Tensor]) -> Tensor:
    """The Hessian of a mean loss by autograd, entry by entry."""
    parameters = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(mean(), parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("runs_out", [False, True], ids=["as drawn", "halved by memory"])
def test_the_loss_is_that_of_the_rows_drawn(name: str, runs_out: bool, monkeypatch: pytest.MonkeyPatch):
    """All rows of the data are drawn, in microbatches of four and two; memory takes them apart, and rows stay rows."""
    data, collate, loss = CASES[name]
    build = HessianOperator.__init__
    sizes: list[list[int]] = []

    def small_only(self: Any, objective: Any, microbatches: Any, *arguments: Any, **options: Any) -> None:
        sizes.append([microbatch.num_rows for microbatch in microbatches])
        if runs_out and max(sizes[-1]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        build(self, objective, microbatches, *arguments, **options)

    monkeypatch.setattr(HessianOperator, "__init__", small_only)
    model = net()
    monitor = CurvatureMonitor(
        model,
        probes=DatasetProbes(data, collate, num_microbatches=2, microbatch_size=4),
        loss=loss,
        measure=[TopEigenpairs(k=1, which="LA", tol=1e-6)],
        when=1,
        block_structure="none",
    )
    record = of(monitor.step(0), "hessian")
    eigenvalues = torch.linalg.eigvalsh(dense(model, lambda: loss(model, collate(data))))
    assert record.error is None
    assert record.scalars["lambda_max"] == pytest.approx(eigenvalues[-1].item(), rel=1e-4)
    assert sizes[-1] == ([2, 2, 2] if runs_out else [4, 2])


class Recurrent(nn.Module):
    """Its outputs are as long as the longest row of a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.RNN(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.last(nn.utils.rnn.pad_packed_sequence(self.first(packed)[0], batch_first=True)[0])[..., 0]


def of_longest(model: Recurrent, batch: Any) -> Tensor:
    """The mean error of each row over its own length."""
    x, lengths, y = batch
    found = model(x, lengths)
    valid = torch.arange(found.shape[1]) < lengths[:, None]
    return (((found - y) ** 2) * valid).sum(1) / lengths


def to_longest(rows: list[Any]) -> tuple[Tensor, ...]:
    x, lengths, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return x, lengths, y[:, : int(lengths.max())]


@pytest.mark.parametrize("loss", [of_longest, lambda model, batch: of_longest(model, batch).mean()], ids=["rows", "mean"])
def test_rows_that_have_a_loss_only_where_they_were_collated_alone(loss: Any) -> None:
    """Every tensor has one row a row, and slices of them have no loss: targets are as long as the longest row."""
    generator = torch.Generator().manual_seed(0)
    lengths = [2, 5, 3, 1, 4, 2]
    data = [(torch.randn(5, 3, generator=generator), torch.tensor(n), torch.randn(5, generator=generator)) for n in lengths]
    model = Recurrent()
    probes = DatasetProbes(data, to_longest, num_microbatches=2, microbatch_size=3)
    monitor = CurvatureMonitor(model, probes=probes, loss=loss, measure=[FisherSpectrum()], when=1)
    monitor.check()
    record = next(record for record in monitor.step(0) if record.measurement == "empirical_fisher" and not record.block)
    assert not record.failed, record.error
    gradients = [torch.autograd.grad(of_longest(model, to_longest([row])).sum(), list(model.parameters())) for row in data]
    squares = sum(float(each.square().sum()) for row in gradients for each in row)
    assert record.scalars["full_trace"] == pytest.approx(squares / 6, rel=1e-4)


def test_a_stream_whose_rows_have_no_loss_alone_is_refused_by_that_name() -> None:
    probes = CapturedProbes(num_microbatches=1, microbatch_size=3)
    monitor = CurvatureMonitor(
        Recurrent(),
        probes=probes,
        loss=lambda model, batch: of_longest(model, batch).mean(),
        measure=[FisherSpectrum(), TopEigenpairs(k=1)],
        when=1,
    )
    data = [(torch.randn(5, 3), torch.tensor(n), torch.randn(5)) for n in (2, 4, 3)]
    monitor.offer(to_longest(data))
    records = {record.measurement: record for record in monitor.step(0) if record.block is None}
    assert "rows cannot be taken apart" in str(records["empirical_fisher"].error)
    assert not records["hessian"].failed, records["hessian"].error


@pytest.mark.parametrize("name", CASES)
def test_single_rows_are_collated_anew(name: str):
    data, collate, loss = CASES[name]
    model = net()
    monitor = CurvatureMonitor(
        model,
        probes=DatasetProbes(data, collate, num_microbatches=2, microbatch_size=4),
        loss=loss,
        measure=[FisherSpectrum()],
        when=1,
        block_structure="none",
    )
    record = of(monitor.step(0), "empirical_fisher")
    gradients = [torch.autograd.grad(loss(model, collate([row])), list(model.parameters())) for row in data]
    trace = sum(part.square().sum().item() for row in gradients for part in row) / len(data)
    assert record.error is None
    assert record.scalars["full_num_samples"] == 6
    assert record.scalars["full_trace"] == pytest.approx(trace, rel=1e-4)


@dataclass
class Batch:
    x: Tensor
    y: Tensor


def test_a_dataclass_is_a_batch_and_is_cut():
    x, y = torch.randn(6, P, dtype=torch.float64, generator=generator()), torch.arange(6) % 3
    model = net().double()
    batches = [Batch(x[:4].float(), y[:4]), Batch(x[4:].float(), y[4:])]
    pairs = compute_spectrum(model, batches, loss=lambda model, batch: F.cross_entropy(model(batch.x), batch.y), k=1)
    truth = torch.linalg.eigvalsh(dense(model, lambda: F.cross_entropy(model(x.float().double()), y)))[-1]
    assert pairs.eigenvalues[0].item() == pytest.approx(truth.item(), rel=1e-3)
    assert [len(piece.content.x) for piece in at_most([as_microbatch(Batch(x, y))], 4)] == [4, 2]


@pytest.mark.parametrize(
    ("content", "num_rows"),
    [
        (ragged(SEQUENCES), 6),
        (packed(SEQUENCES), 6),
        (of_images(SEQUENCES), 6),
        ({"x": torch.ones(4, P), "constant": torch.ones(3), "labels": torch.ones(4)}, 4),
        ({"x": [torch.ones(4, P)] * 4, "y": torch.ones(4)}, 4),
    ],
    ids=["ragged list", "packed sequence", "targets", "another length", "list that may be of rows"],
)
def test_what_has_not_one_row_each_stays_whole(content: Any, num_rows: int):
    microbatch = as_microbatch(content)
    assert microbatch.num_rows == num_rows
    assert microbatch.is_whole
    assert at_most([microbatch], 1) == [microbatch]
    with pytest.raises(RefusedError, match="rows of a microbatch cannot be taken apart"):
        microbatch.take(torch.tensor([0]))


def test_rows_that_cannot_be_counted_are_to_be_said():
    content = {"x": torch.ones(4, P), "y": torch.ones(8)}
    with pytest.raises(ConfigurationError, match="does not tell how many rows it has"):
        as_microbatch(content)
    assert as_microbatch(Microbatch(content=content, num_rows=4)).is_whole


def test_a_whole_microbatch_that_does_not_fit_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HessianOperator, "__init__", fails)
    monitor = CurvatureMonitor(
        net(), probes=[ragged(SEQUENCES)], loss=loss_of_ragged, measure=[TopEigenpairs(k=1)], when=1, block_structure="none"
    )
    assert "memory ran out, and a microbatch stays whole" in (of(monitor.step(0), "hessian").error or "")


def test_rows_that_a_collator_leaves_out_are_not_counted():
    def collate(rows: list[int]) -> Tensor:
        return torch.stack([torch.full((P,), float(row)) for row in rows if row % 3])

    (drawn,) = DatasetProbes(list(range(6)), collate, num_microbatches=1, microbatch_size=6).draw(0)
    assert drawn.num_rows == 4
    assert drawn.is_sliceable


def test_collators_that_take_keys_away_can_be_called_again():
    def collate(rows: list[dict[str, Any]]) -> Any:
        return {"x": [row.pop("x") for row in rows], "y": torch.tensor([row.pop("y") for row in rows])}

    data = [{"x": x, "y": y} for x, y in SEQUENCES]
    (drawn,) = DatasetProbes(data, collate, num_microbatches=1, microbatch_size=6).draw(0)
    again = drawn.take(torch.tensor([2, 4]))
    assert [len(x) for x in again["x"]] == [len(drawn["x"][2]), len(drawn["x"][4])]
    assert sorted(data[0]) == ["x", "y"]


def test_pieces_keep_the_seed_and_what_is_done_to_tensors():
    (drawn,) = DatasetProbes(SEQUENCES, packed, num_microbatches=1, microbatch_size=6).draw(0)
    seeded = Microbatch(content=drawn.content, num_rows=6, seed=7, collate=drawn.collate)
    piece = seeded.mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor).take(torch.tensor([1, 3]))
    assert isinstance(piece["x"], PackedSequence)
    assert (piece.seed, piece.num_rows, piece["x"].data.dtype) == (7, 2, torch.float64)
