"""Losses that couple the rows of a batch are measured on whole batches of the size of training, and these are never cut."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvature_callbacks import CapturedProbes, EdgeRatio, FisherSpectrum, Record, SpectralDensity, TopEigenpairs
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.probes import probes_from_loader, stable_seed
from tests.reference import dense_hessian
from tests.run.monitor_cases import new_monitor
from tests.training_cases import reports

TRAINING_ROWS, SIZES = 16, {"num_microbatches": 2, "microbatch_size": 4}
TOP = TopEigenpairs(k=1, which="LA", tol=1e-6, max_matvecs=80)


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()


def pairs(num_rows: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_rows, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (num_rows,), generator=generator))


def loader() -> DataLoader[Any]:
    return DataLoader(pairs(), batch_size=TRAINING_ROWS)


def whole_batches(step: int) -> list[Any]:
    probes = probes_from_loader(loader(), **SIZES)
    assert probes is not None
    return [batch.content for batch in probes.draw_whole(stable_seed(0, step))]


def contrastive(model: nn.Module, batch: Any) -> SampleLosses:
    """Every row is told from all others of its batch: the more of them, the higher the loss."""
    outputs = model(batch[0])
    losses = F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))
    ones = torch.ones(len(outputs), dtype=torch.int64)
    return SampleLosses(losses * len(outputs), ones, None, coupled="a contrastive loss")


def contrastive_mean(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch[0])
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


@pytest.mark.parametrize("microbatch_size", [1, 2, 3])
def test_rows_are_found_to_be_coupled_where_microbatches_are_too_small_to_tell(microbatch_size: int) -> None:
    """Of a single row a contrastive loss is zero."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    sizes = {"num_microbatches": 4, "microbatch_size": microbatch_size}
    probes = probes_from_loader(loader(), **sizes)
    assert probes is not None
    monitor = new_monitor(model, probes=probes, loss=contrastive_mean, measure=[TOP], when=1)
    monitor.check()
    hessian = of(monitor.step(0), "hessian")
    batches = [batch.content for batch in probes.draw_whole(stable_seed(0, 0))]
    assert {len(batch[0]) for batch in batches} == {TRAINING_ROWS}
    assert "change places" in hessian.metadata["coupled"]
    assert hessian.scalars["lambda_max"] == pytest.approx(top_of(model, batches, loss=contrastive_mean), rel=1e-5)


def of_first(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["a"][0]), batch["a"][1])


def test_batches_that_do_not_tell_their_rows_are_measured_whole() -> None:
    """Two loaders with batches of different size, of which the loss takes one: each batch counts alike, and none is cut."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    firsts, seconds = (iter(DataLoader(pairs(), batch_size=size)) for size in (5, 7))
    batches = [{"a": next(firsts), "b": next(seconds)} for _ in range(2)]
    monitor = new_monitor(model, probes=CapturedProbes(**SIZES), loss=of_first, measure=[FisherSpectrum(), TOP], when=1)
    for batch in batches:
        monitor.offer(batch)
    records = monitor.step(0)
    assert "how many rows its batches have is not known" in str(of(records, "empirical_fisher").error)
    expected = top_of(model, batches, loss=of_first)
    assert of(records, "hessian").scalars["lambda_max"] == pytest.approx(expected, rel=1e-5)
    assert of(records, "hessian").metadata["coupled"] == "how many rows its batches have is not known"


def of(records: list[Record], name: str) -> Record:
    return next(record for record in records if record.measurement == name)


def top_of(model: nn.Module, batches: list[Any], *, loss: Any) -> float:
    """The largest eigenvalue of the mean over batches, every module in training mode."""
    names = [name for name, _ in model.named_parameters()]
    hessian = dense_hessian(model, lambda m: torch.stack([loss(m.train(), batch) for batch in batches]).mean(), names)
    return float(torch.linalg.eigvalsh(hessian)[-1])


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_batch_norms_have_batches_of_the_size_of_training() -> None:
    model = normalised()
    density = SpectralDensity(num_probes=2, num_steps=2, deflate=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    measure = [FisherSpectrum(), TOP, density, EdgeRatio(tol=1e-6, max_matvecs=80)]
    records = new_monitor(model, probes=loader(), measure=measure, optimizer=optimizer, **SIZES).step(3)
    top = top_of(model, whole_batches(3), loss=cross_entropy)
    assert of(records, "hessian").scalars["lambda_max"] == pytest.approx(top, rel=1e-5)
    assert of(records, "edge").scalars["ratio"] == pytest.approx(top * 0.5 / 2, rel=1e-5)
    about = {"batch_norm": "batch", "num_rows": 16, "batch_size": 16, "coupled": "batch norm"}
    for name in ("hessian", "hessian_density", "edge"):
        assert about.items() <= of(records, name).metadata.items()
    fisher = of(records, FisherSpectrum().name)
    assert (fisher.metadata["batch_norm"], fisher.metadata["num_samples"]) == ("eval", 8)
    assert of(records, "probe").scalars["rows"] == 8


@pytest.mark.parametrize("choice", ["eval", "batch"])
def test_the_choice_holds_for_all_measurements(choice: Any) -> None:
    model = normalised()
    records = new_monitor(model, probes=loader(), measure=[TOP, FisherSpectrum()], batch_norm=choice, **SIZES).step(0)
    hessian, refused = of(records, "hessian"), [record for record in records if record.error]
    assert hessian.metadata["batch_norm"] == choice
    if choice == "eval":
        assert not refused
        assert "batch_size" not in hessian.metadata
        assert hessian.metadata["num_rows"] == 8
    else:
        assert [record.measurement for record in refused] == [FisherSpectrum().name]
        assert "couple its samples" in (refused[0].error or "")


def test_a_coupled_loss_is_that_of_whole_batches() -> None:
    model = normalised()[:1]
    records = new_monitor(model, probes=loader(), measure=[TOP], loss=contrastive, **SIZES).step(0)
    top = top_of(model, whole_batches(0), loss=lambda m, batch: contrastive(m, batch).total / len(batch[0]))
    hessian = of(records, "hessian")
    assert hessian.scalars["lambda_max"] == pytest.approx(top, rel=1e-5)
    assert hessian.metadata["coupled"] == "a contrastive loss"
    assert hessian.metadata["batch_size"] == TRAINING_ROWS


@dataclass(frozen=True)
class Greedy:
    """Memory for it runs out at more than `most` rows of what it takes."""

    name: str
    is_whole: bool
    most: int = 2

    def init(self, problem: Any) -> None:
        return None

    def measure(self, problem: Any, state: None) -> Any:
        taken = problem.trained.take().microbatches if self.is_whole else problem.microbatches
        rows = max(microbatch.num_rows for microbatch in taken)
        if rows > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Record(step=problem.step, measurement=self.name, scalars={"most": float(rows)})], None


def test_whole_batches_are_not_cut_when_memory_runs_out(caplog: Any) -> None:
    """What needs no whole batch is; what has failed does not make the microbatches of others smaller."""
    measure = [Greedy("whole", is_whole=True), Greedy("other", is_whole=False, most=4), Greedy("rows", is_whole=False)]
    records = new_monitor(normalised(), probes=loader(), measure=measure, **SIZES).step(0)
    error = of(records, "whole").error or ""
    assert "never cut where the loss couples its rows (batch norm)" in error
    assert "`batch_norm`='eval'" in error
    assert [of(records, name).scalars["most"] for name in ("other", "rows")] == [4, 2]
    assert any("never cut" in message for message in reports(caplog))


def test_where_nothing_is_coupled_microbatches_are_cut_for_everybody() -> None:
    model = nn.Linear(6, 3).double()
    records = new_monitor(model, probes=loader(), measure=[Greedy("whole", is_whole=True)], **SIZES).step(0)
    assert of(records, "whole").scalars["most"] == 2


def test_whole_batches_of_a_stream_are_kept_from_the_time_they_are_wanted() -> None:
    watching = new_monitor(normalised(), probes=CapturedProbes(**SIZES), measure=[TOP, FisherSpectrum()])
    batches = [[column[start : start + TRAINING_ROWS] for column in pairs().tensors] for start in (0, 16)]
    for step, batch in enumerate(batches):
        watching.offer(batch)
        hessian = of(watching.step(step), "hessian")
        assert hessian.metadata["num_rows"] == TRAINING_ROWS
        assert hessian.scalars["lambda_max"] == pytest.approx(top_of(normalised(), [batch], loss=cross_entropy), rel=1e-5)
