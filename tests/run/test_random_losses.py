"""Losses that draw random numbers: one draw a microbatch and probe, in every product, pass and check of it."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import (
    CapturedProbes,
    ConfigurationError,
    CurvatureMonitor,
    FisherSpectrum,
    GradientNoise,
    KFACCoverage,
    Record,
    TopEigenpairs,
    compute_fisher_spectrum,
)
from curvature_callbacks.microbatch import at_most
from curvature_callbacks.probes import stable_seed
from tests.reference import dense_hessian, fisher_eigenvalues, gradients_of, stacked
from tests.run.monitor_cases import example_batch, row_losses

Loss = Callable[[nn.Module, Any], Tensor]


def data(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 6, generator=generator) for size in sizes]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(7, 8), nn.SiLU(), nn.Linear(8, 6))

    def noised(self, x: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """(N,) losses of a diffusion model at given draws."""
        a = 1 - steps[:, None] / 1000
        found = self.net(torch.cat([a * x + (1 - a) * noise, steps[:, None] / 1000], 1))
        return F.mse_loss(found, noise, reduction="none").mean(1)


def drawn(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 1000, (len(x),)), torch.randn_like(x)


def denoising(model: Denoiser, x: Tensor) -> Tensor:
    return model.noised(x, *drawn(x))


def denoising_mean(model: Denoiser, x: Tensor) -> Tensor:
    return denoising(model, x).mean()


def draws_of_probe(x: list[Tensor], step: int) -> list[tuple[Tensor, Tensor]]:
    """What the loss draws for each whole microbatch of the probe at `step`, from the seeds of a run with seed 0."""
    draws = []
    for index, batch in enumerate(x):
        torch.manual_seed(stable_seed(stable_seed(0, step), 0, index))
        draws.append(drawn(batch))
    return draws


@pytest.mark.parametrize("loss", [denoising, denoising_mean], ids=["rows", "mean"])
def test_spectra_are_those_at_one_draw_of_each_microbatch(loss: Loss) -> None:
    """Against the same network at the noise of these seeds, row by row in float64."""
    model, x = Denoiser(), data(4, 3)
    measure = [FisherSpectrum(), TopEigenpairs(k=2, tol=1e-6), GradientNoise(), KFACCoverage()]
    monitor = CurvatureMonitor(model, probes=x, loss=loss, measure=measure, when=1)
    traces = []
    for step in (0, 1):
        records = {record.measurement: record for record in monitor.step(step) if record.block is None}
        assert not any(record.failed for record in records.values())
        assert all(record.metadata["random"] for name, record in records.items() if name != "probe")
        rows = [
            (batch[i : i + 1].double(), steps[i : i + 1], noise[i : i + 1].double())
            for batch, (steps, noise) in zip(x, draws_of_probe(x, step), strict=True)
            for i in range(len(batch))
        ]
        G = stacked(gradients_of(model, [lambda replica, row=row: replica.noised(*row).sum() for row in rows]))
        traces.append(records["empirical_fisher"].scalars["full_trace"])
        assert traces[-1] == pytest.approx(float(fisher_eigenvalues(G).sum()), rel=1e-4)

        def mean(replica: nn.Module, rows: Any = rows) -> Tensor:
            return torch.stack([replica.noised(*row).sum() for row in rows]).mean()

        top = torch.linalg.eigvalsh(dense_hessian(model, mean, [name for name, _ in model.named_parameters()]))
        assert records["hessian"].scalars["lambda_max"] == pytest.approx(float(top[-1]), rel=1e-4)
    assert abs(traces[0] - traces[1]) > 0.01 * traces[0]  # another draw at the next probe


class Masked(nn.Module):
    """Functional dropout left on, between layers, and a coin for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        dropped = F.dropout(hidden, 0.3)
        self.masks.append(dropped.detach() == 0)
        return self.last(dropped) * (1 + random.random())


def test_one_mask_a_microbatch_whatever_is_measured() -> None:
    """Single rows have theirs of the batch's mask, and so do the pieces that memory asks for."""
    model, batch = Masked(), example_batch(5)
    noted: list[Tensor] = []

    def loss(model: Masked, rows: Any) -> Tensor:
        result = F.cross_entropy(model(rows[0]), rows[1])
        noted.append(model.masks.pop())
        return result

    measure = [FisherSpectrum(), TopEigenpairs(k=1), TopEigenpairs(operator="finite_difference_hessian", k=1, max_matvecs=4)]
    monitor = CurvatureMonitor(model, probes=[batch], loss=loss, measure=measure, when=1)
    monitor.check(0)
    noted.clear()
    monitor.step(0)
    assert not any(record.failed for record in monitor.history)
    whole = [mask for mask in noted if len(mask) == 5]
    assert all(torch.equal(mask, whole[0]) for mask in whole)
    rows = {tuple(row.tolist()) for row in whole[0]}
    parts = [mask for mask in noted if len(mask) < 5]
    assert parts
    assert all(tuple(row.tolist()) in rows for mask in parts for row in mask)


def test_pieces_add_up_to_their_microbatch() -> None:
    """As after memory has run out: the same draw in smaller microbatches."""
    model, (x,) = Denoiser(), data(6)
    monitor = CurvatureMonitor(model, probes=[x], loss=denoising_mean, measure=[Pieces()], when=1)
    (record,) = [record for record in monitor.step(0) if record.measurement == "pieces"]
    assert record.scalars["sum"] == pytest.approx(record.scalars["whole"], rel=1e-5)
    assert record.scalars["sum"] == pytest.approx(record.scalars["smaller"], rel=1e-5)


class Trace:
    """The trace of the Fisher beside that of single rows, in microbatches of at most `size` rows."""

    name = "trace"

    def __init__(self, size: int) -> None:
        self.size = size

    def init(self, problem: Any) -> None:
        return None

    def measure(self, problem: Any, state: None) -> Any:
        pieces, leaves = at_most(problem.microbatches, self.size), problem.objective.leaves()
        squares = 0.0
        for row in (row for piece in pieces for row in piece.singles()):
            gradients = torch.autograd.grad(problem.objective(row, leaves).total, list(leaves.values()))
            squares += sum(float(gradient.square().sum()) for gradient in gradients)
        again = sum(float(problem.objective(piece, leaves).total) for piece in pieces)
        single = sum(float(problem.objective(row, leaves).total) for piece in pieces for row in piece.singles())
        scalars = {"squares": squares, "again": again, "single": single}
        return [Record(step=problem.step, measurement=self.name, scalars=scalars)], None


def test_rows_have_the_draw_of_their_piece_where_the_whole_was_never_evaluated() -> None:
    """From a probe at which memory ran out on, microbatches are small from the beginning."""
    model, (x,) = Denoiser(), data(8)
    monitor = CurvatureMonitor(model, probes=[x], loss=denoising_mean, measure=[FisherSpectrum(), Trace(4)], when=1)
    monitor.check(0)
    monitor.step(0)
    monitor._probing._memory.row_limit = 4
    records = {record.measurement: record for record in monitor.step(1) if record.block is None}
    assert not records["empirical_fisher"].failed, records["empirical_fisher"].error
    of_rows = records["trace"].scalars
    assert of_rows["single"] == pytest.approx(of_rows["again"], rel=1e-5)
    assert records["empirical_fisher"].scalars["full_trace"] == pytest.approx(of_rows["squares"] / 8, rel=1e-5)


def test_rows_have_the_draw_of_their_batch_where_a_stream_was_cut() -> None:
    model, probes = Denoiser(), CapturedProbes(num_microbatches=2, microbatch_size=3)
    monitor = CurvatureMonitor(model, probes=probes, loss=denoising_mean, measure=[FisherSpectrum(), Trace(3)], when=1)
    for x in data(8, 8):
        monitor.offer(x)
    for step in (0, 1):
        records = {record.measurement: record for record in monitor.step(step) if record.block is None}
        assert not records["empirical_fisher"].failed, records["empirical_fisher"].error
        of_rows = records["trace"].scalars
        assert records["empirical_fisher"].scalars["full_trace"] == pytest.approx(of_rows["squares"] / 6, rel=1e-5)


class Pieces:
    """Losses of a microbatch, of its halves, and of thirds of a half."""

    name = "pieces"

    def init(self, problem: Any) -> None:
        return None

    def measure(self, problem: Any, state: None) -> Any:
        def total(size: int) -> float:
            return sum(float(problem.objective(piece).total) for piece in at_most(at_most(problem.microbatches, 3), size))

        whole = float(problem.objective(problem.microbatches[0]).total)
        scalars = {"whole": whole, "sum": total(3), "smaller": total(1)}
        return [Record(step=problem.step, measurement=self.name, scalars=scalars)], None


def mixed(model: nn.Module, rows: Any) -> Tensor:
    x, labels = rows
    others = torch.randperm(len(x))
    return F.cross_entropy(model(0.7 * x + 0.3 * x[others]), labels)


def odd(model: nn.Module, rows: Any) -> Tensor:
    """Draws one number more than it has rows."""
    x, labels = rows
    return row_losses(model, (x * torch.rand(len(x) + 1)[1:, None], labels)).mean()


def rejecting(model: nn.Module, rows: Any) -> Tensor:
    """Draws as many numbers as it takes until one is accepted, so that a row's depend on those before."""
    return row_losses(model, (rows[0] * torch._standard_gamma(rows[0].exp()), rows[1]))


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (mixed, "rows that change places between batches"),
        (odd, "do not belong to single rows, which have no losses"),
        (rejecting, "random numbers that do not belong to single"),
    ],
)
def test_draws_of_the_whole_batch_are_refused_by_name(loss: Loss, reason: str) -> None:
    """The Fisher alone: a Hessian is that of the whole batch at its draw."""
    measure = [FisherSpectrum(), TopEigenpairs(k=1)]
    monitor = CurvatureMonitor(nn.Linear(6, 3), probes=[example_batch()], loss=loss, measure=measure, when=1)
    monitor.step(0)
    errors = {record.measurement: record.error for record in monitor.history}
    assert reason in str(errors["empirical_fisher"])
    assert errors["hessian"] is None


HIDDEN = {"generator": torch.Generator().manual_seed(0)}


def hidden(model: nn.Module, rows: Any) -> Tensor:
    x, labels = rows
    return row_losses(model, (x + torch.randn(x.shape, generator=HIDDEN["generator"]), labels))


def test_a_generator_that_cannot_be_found_is_refused_before_training() -> None:
    monitor = CurvatureMonitor(nn.Linear(6, 3), probes=[example_batch()], loss=hidden, when=1)
    with pytest.raises(ConfigurationError, match="draws from a generator that a probe cannot find"):
        monitor.check()


class Keeping(nn.Module):
    """A generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.generator = nn.Linear(6, 3), torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.randn(x.shape, generator=self.generator))


def in_closure() -> tuple[nn.Module, Loss, torch.Generator]:
    generator = torch.Generator().manual_seed(3)

    def loss(model: nn.Module, rows: Any) -> Tensor:
        return row_losses(model, (rows[0] + torch.randn(rows[0].shape, generator=generator), rows[1]))

    return nn.Linear(6, 3), loss, generator


def in_module() -> tuple[nn.Module, Loss, torch.Generator]:
    model = Keeping()
    return model, row_losses, model.generator


@pytest.mark.parametrize("build", [in_closure, in_module])
def test_generators_of_modules_and_closures_are_kept_still(build: Callable[[], Any]) -> None:
    model, loss, generator = build()
    before = generator.get_state()
    monitor = CurvatureMonitor(model, probes=[example_batch()], loss=loss, measure=[FisherSpectrum()], when=1)
    monitor.check()
    records = [record for step in (0, 1) for record in monitor.step(step) if record.measurement == "empirical_fisher"]
    assert torch.equal(generator.get_state(), before)
    assert all(record.metadata["random"] for record in records)
    assert not any(record.failed for record in records)
    first, second = (record.scalars["full_trace"] for record in records if record.block is None)
    assert first != second


def test_a_loss_that_begins_to_draw_has_one_draw_at_fixed_rows_too() -> None:
    """What is known of the draws of a probe is forgotten behind it."""
    model, (x,), seen = Denoiser(), data(4), list[float]()
    noise = [0.0]

    def loss(model: Denoiser, rows: Tensor) -> Tensor:
        value = model.noised(rows, torch.zeros(len(rows)), noise[0] * torch.randn_like(rows) if noise[0] else rows).mean()
        seen.append(float(value.detach()))
        return value

    measure = [TopEigenpairs(k=1, max_matvecs=6)]
    monitor = CurvatureMonitor(model, probes=[x], loss=loss, measure=measure, when=1, draw="fixed")
    monitor.check(0)
    monitor.step(0)
    noise[0] = 1.0
    seen.clear()
    monitor.step(1)
    assert len(set(seen)) == 1


def test_a_loss_that_draws_nothing_is_not_called_random() -> None:
    monitor = CurvatureMonitor(nn.Linear(6, 3), probes=[example_batch()], loss=row_losses, measure=[FisherSpectrum()], when=1)
    assert all("random" not in record.metadata for record in monitor.step(0))


def test_one_call_says_that_it_is_one_draw(caplog: Any) -> None:
    (x,) = data(5)
    traces = [compute_fisher_spectrum(Denoiser(), x, loss=denoising, seed=seed).full.metrics()["trace"] for seed in (0, 0, 1)]
    assert traces[0] == traces[1] != traces[2]
    assert "at one draw, that of `seed`=1" in caplog.text
