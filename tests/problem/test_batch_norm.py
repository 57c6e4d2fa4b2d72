"""By which statistics batch norms normalise in a probe: those of whole batches in Hessians, running ones in Fishers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import compute_fisher_spectrum, compute_spectrum
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.errors import RefusedError
from curvature_callbacks.problem.problem import Problem
from tests.cases import CLASSES, in_general_position, pair_batch
from tests.operators.operator_cases import dense
from tests.reference import dense_ggn, dense_hessian, fisher_eigenvalues, mean_loss, relative_error, sample_gradients, stacked

Batch = tuple[Tensor, Tensor]


class Functional(nn.Module):
    """Batch norm by torch's function and a flag, as users write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.scale, training=self.training)


class ByHand(nn.BatchNorm1d):
    """Derived from torch's, with statistics of its own making."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.running_mean += 0.1 * (x.detach().mean(0) - self.running_mean)
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + self.eps).sqrt() * self.weight + self.bias


def around(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, CLASSES))


def of_images(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES))


class UsedTwice(nn.Module):
    """One norm of two layers, whose running statistics are plain means."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.hidden, self.head = nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.norm(x))).tanh())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: around(nn.BatchNorm1d(4)),
    "of channels": lambda: of_images(nn.BatchNorm1d(3, affine=False)),
    "used twice": UsedTwice,
    "by a function": lambda: around(Functional(4)),
    "by hand": lambda: around(ByHand(4)),
    "synchronised, of one process": lambda: around(nn.SyncBatchNorm(4)),
    "of rows": lambda: of_images(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
}
BATCHES = [pair_batch(rows, 0, torch.Generator().manual_seed(rows)) for rows in (6, 4)]


def training(build: Callable[[], nn.Module]) -> nn.Module:
    return in_general_position(build).double().train()


def as_in_training(model: nn.Module) -> nn.Module:
    """All in training mode but dropout and what is marked as frozen."""
    for module in model.modules():
        module.training = not isinstance(module, nn.Dropout) and not getattr(module, "is_frozen", False)
    return model


def trained_loss(model: nn.Module) -> Tensor:
    """The mean over rows, with the statistics of each batch."""
    losses = [F.cross_entropy(as_in_training(model)(x), y, reduction="none") for x, y in BATCHES]
    return torch.cat(losses).mean()


def trained_targets(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in BATCHES:
        yield from zip(as_in_training(model)(x), y, strict=True)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_as_found(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_hessians_and_ggn_are_of_the_batches_and_fishers_of_the_rows(name: str) -> None:
    model = training(MODELS[name])
    before, names = state(model), names_of(model)
    hessian = dense_hessian(model, trained_loss, names)
    ggn = dense_ggn(model, names, trained_targets, F.cross_entropy)
    rows = stacked(sample_gradients(model, BATCHES, "pair"))
    with offline_problem(model, BATCHES, loss="cross_entropy", params_filter=None) as problem:
        assert relative_error(dense(problem.hessian()), hessian) < 1e-10
        assert relative_error(dense(problem.finite_difference_hessian()), hessian) < 1e-5
        assert relative_error(dense(problem.ggn()), ggn) < 1e-10
        assert is_as_found(model, before), "the Fishers of a probe see the running statistics"
        gram = sum(problem.grams().grams.values())
        assert relative_error(torch.linalg.eigvalsh(gram / len(rows)).flip(0), fisher_eigenvalues(rows)) < 1e-10
        assert problem.trained.take().about["batch_norm"] == "batch"
    assert is_as_found(model, before)
    assert all(module.training for module in model.modules())


def hessian_top(model: nn.Module, **options: Any) -> Tensor:
    pairs = compute_spectrum(model, BATCHES, loss="cross_entropy", k=1, which="LA", tol=1e-8, max_matvecs=60, **options)
    return pairs.eigenvalues


def test_running_statistics_are_measured_where_they_are_chosen() -> None:
    model = training(MODELS["batch norm"])
    losses = (lambda m: mean_loss(m, BATCHES, "pair")), trained_loss
    evaluated, trained = (dense_hessian(model, loss, names_of(model)) for loss in losses)
    tops = [torch.linalg.eigvalsh(matrix)[-1:] for matrix in (evaluated, trained)]
    assert relative_error(hessian_top(model, batch_norm="eval"), tops[0]) < 1e-6
    assert relative_error(hessian_top(model), tops[1]) < 1e-6
    assert relative_error(*tops) > 0.1


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_frozen_norm_stays_on_running_statistics_where_flags_tell(mode: str) -> None:
    """In a model that is in evaluation mode as a whole every norm counts as training."""
    model = training(lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)))
    if mode == "training":
        model[0].is_frozen = True
        model[0].eval()
    else:
        model.eval()
    flags = [module.training for module in model.modules()]
    truth = torch.linalg.eigvalsh(dense_hessian(model, trained_loss, names_of(model)))[-1:]
    assert relative_error(hessian_top(model), truth) < 1e-6
    assert [module.training for module in model.modules()] == flags


def test_a_model_in_half_precision_is_measured_in_float32() -> None:
    model = training(MODELS["of channels"]).bfloat16()
    before = state(model)
    truth = torch.linalg.eigvalsh(dense_hessian(model, trained_loss, names_of(model)))[-1:]
    assert relative_error(hessian_top(model, seed=1), truth) < 1e-4
    assert is_as_found(model, before)


@pytest.mark.parametrize("choice", ["batch", "eval", None])
def test_a_norm_without_running_statistics_couples_rows_whatever_is_chosen(choice: Any) -> None:
    model = training(lambda: around(nn.BatchNorm1d(4, track_running_stats=False)))
    with offline_problem(model, BATCHES, loss="cross_entropy", params_filter=None, batch_norm=choice) as problem:
        about = problem.trained.take().about
        assert about["coupled"].startswith("batch norm")
        assert about["batch_norm"] == "batch"
        assert relative_error(dense(problem.hessian()), dense_hessian(model, trained_loss, names_of(model))) < 1e-10


FISHERS: dict[str, Callable[[Problem], Any]] = {
    "Gram": lambda problem: problem.grams(),
    "empirical": lambda problem: problem.empirical_fisher(),
    "sampled": lambda problem: problem.sampled_fisher(),
    "K-FAC": lambda problem: problem.kfac(sharing="expand", corrected=False),
}


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_fisher_of_batch_statistics_is_refused(fisher: str) -> None:
    model = training(MODELS["batch norm"])
    options: dict[str, Any] = {"loss": "cross_entropy", "params_filter": None, "batch_norm": "batch"}
    with offline_problem(model, BATCHES, **options) as problem, pytest.raises(RefusedError, match="couple its samples"):
        FISHERS[fisher](problem)


def test_nothing_is_refused_where_no_norm_couples_rows() -> None:
    model = training(MODELS["of rows"])
    spectra = [compute_fisher_spectrum(model, BATCHES, loss="cross_entropy", batch_norm=choice) for choice in ("batch", None)]
    assert torch.equal(*(spectrum.full.eigenvalues for spectrum in spectra))
    with pytest.raises(RefusedError, match="`batch_norm` at None"):
        compute_fisher_spectrum(training(MODELS["batch norm"]), BATCHES, loss="cross_entropy", batch_norm="batch")


def test_a_norm_over_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    model = training(MODELS["synchronised, of one process"])
    with pytest.raises(RefusedError, match="a SyncBatchNorm over several processes"):
        hessian_top(model)
    assert hessian_top(model, batch_norm="eval").isfinite().all()
