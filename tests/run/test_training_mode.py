"""Losses that are another one in evaluation mode: measured as they train where that is not the noise of dropout."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, CurvatureMonitor, FisherSpectrum, TopEigenpairs, compute_fisher_spectrum
from tests.reference import dense_hessian, fisher_eigenvalues, gradients_of, largest_of_hessian, stacked
from tests.run.monitor_cases import example_batch


class Auxiliary(nn.Module):
    """Two heads in training mode, dropout and a counter of calls; how many heads evaluation mode has is told."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.body, self.drop, self.out, self.side = nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.out(self.drop(hidden)), self.side(hidden)

    def forward(self, x: Tensor) -> Any:
        out, side = self.both(x)
        if not self.training and self.heads == 1:
            return out
        return out, side if self.training else torch.zeros_like(side)


def loss_of_both(model: nn.Module, batch: Any) -> Tensor:
    out, side = model(batch[0])
    return F.cross_entropy(out, batch[1], reduction="none") + 0.3 * F.cross_entropy(side, batch[1], reduction="none")


def as_it_trains(model: Any, x: Tensor, labels: Tensor) -> Tensor:
    """(N,) with both heads and without dropout; `model` is in evaluation mode."""
    out, side = model.both(x)
    return F.cross_entropy(out, labels, reduction="none") + 0.3 * F.cross_entropy(side, labels, reduction="none")


def truth(model: nn.Module, batch: Any) -> tuple[float, float]:
    """Trace of the Fisher and largest eigenvalue of the Hessian."""
    x, labels = batch[0].double(), batch[1]
    rows = [lambda m, i=i: as_it_trains(m, x[i : i + 1], labels[i : i + 1]).sum() for i in range(len(x))]
    fisher = fisher_eigenvalues(stacked(gradients_of(model, rows)))
    names = [name for name, _ in model.named_parameters()]
    hessian = dense_hessian(model, lambda replica: as_it_trains(replica, x, labels).mean(), names)
    return float(fisher.sum()), float(torch.linalg.eigvalsh(hessian)[-1])


@pytest.mark.parametrize("heads", [1, 2], ids=["raises in evaluation mode", "is another one"])
def test_auxiliary_heads_are_measured_as_they_train(heads: int, caplog: Any) -> None:
    model, batch = Auxiliary(heads).train(), example_batch()
    measure = [FisherSpectrum(), TopEigenpairs(k=1, which="LA", tol=1e-6)]
    monitor = CurvatureMonitor(model, probes=[batch], loss=loss_of_both, measure=measure, when=1)
    monitor.check()
    trace, top = truth(model, batch)
    for step in (0, 1):
        records = {record.measurement: record for record in monitor.step(step) if record.block is None}
        assert records["empirical_fisher"].scalars["full_trace"] == pytest.approx(trace, rel=1e-4)
        assert records["hessian"].scalars["lambda_max"] == pytest.approx(top, rel=1e-4)
        assert all(records[name].metadata["training_mode"] for name in ("empirical_fisher", "hessian"))
    assert caplog.text.count("the loss is another one in evaluation mode") == 1
    assert all(module.training for module in model.modules())


class Labelled(nn.Module):
    """Returns a loss of its own, to which it adds one of another head in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.side = nn.Embedding(11, 8), nn.Linear(8, 11), nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        hidden = torch.tanh(self.embedding(input_ids))
        logits = self.head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.training:
            loss = loss + F.cross_entropy(self.side(hidden).flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.mark.parametrize("is_late", [False, True], ids=["labels everywhere", "none in the first rows"])
@pytest.mark.parametrize("loss", [None, lambda model, batch: model(**batch).loss], ids=["own", "function"])
def test_a_loss_that_the_model_adds_to_in_training_is_in_what_is_measured(loss: Any, is_late: bool) -> None:
    """Whose logits alone tell another loss, in either mode."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(11, (6, 5), generator=generator) for _ in range(2))
    if is_late:
        labels[:2] = -100
    model, batch = Labelled(), {"input_ids": ids, "labels": labels}
    trained = model(**batch).loss
    top = largest_of_hessian(float64_training_copy(model), lambda replica: replica(**batch).loss)
    monitor = CurvatureMonitor(model, probes=[batch], loss=loss, measure=[TopEigenpairs(k=1, which="LA", tol=1e-6)], when=1)
    monitor.check()
    for step in (0, 1):
        records = {record.measurement: record for record in monitor.step(step) if record.block is None}
        assert records["probe"].scalars["probe_loss"] == pytest.approx(trained.item(), rel=1e-5)
        assert records["hessian"].scalars["lambda_max"] == pytest.approx(top, rel=1e-4)


def float64_training_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().train()


def test_one_call_has_training_mode_where_nothing_else_can_be_computed() -> None:
    model, batch = Auxiliary(), example_batch()
    found = compute_fisher_spectrum(model, batch, loss=loss_of_both).full.metrics()["trace"]
    assert found == pytest.approx(truth(model, batch)[0], rel=1e-4)


class Smoothed(nn.Module):
    """Writes a buffer in training mode, as batch norms and power iterations do, and divides by it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(6, 3)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean())
        return self.out(x / self.scale)


class Dropping(nn.Module):
    """Dropout by function, in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(x, 0.5, training=self.training))


USUAL = {
    "dropout": lambda: nn.Sequential(nn.Dropout(), nn.Linear(6, 3)),
    "dropout by function": Dropping,
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)),
    "a buffer that is written": Smoothed,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)),
}


@pytest.mark.parametrize("name", USUAL)
def test_others_stay_in_evaluation_mode(name: str) -> None:
    model = USUAL[name]().train()
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    monitor = CurvatureMonitor(
        model, probes=[example_batch()], loss="cross_entropy", measure=[FisherSpectrum()], when=1, batch_norm="eval"
    )
    monitor.check()
    records = [record for record in monitor.step(0) if record.measurement == "empirical_fisher"]
    assert not any("training_mode" in record.metadata or record.failed for record in records)
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_modules_that_training_has_in_evaluation_mode_stay_there() -> None:
    """Then the loss has no second head in training either."""
    model = Auxiliary(heads=2).train()
    model.eval()
    model.drop.train()
    monitor = CurvatureMonitor(model, probes=[example_batch()], loss=loss_of_both, measure=[FisherSpectrum()], when=1)
    monitor.check()
    assert not any("training_mode" in record.metadata for record in monitor.step(0))


def test_a_loss_that_cannot_be_computed_at_all_is_refused_with_its_reason() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise ValueError("too many values")

    monitor = CurvatureMonitor(Auxiliary(), probes=[example_batch()], loss=loss, when=1)
    with pytest.raises(ConfigurationError, match="ValueError: too many values"):
        monitor.check()
