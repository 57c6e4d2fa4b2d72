"""Criteria of PyTorch as the run's loss, and labels that are smoothed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

from curvature_callbacks import ConfigurationError, ProbeError, Problem, compute_fisher_spectrum, compute_spectrum
from curvature_callbacks.model.loss.resolve import resolve_loss
from tests.cases import CASES, CLASSES, causal_batch, in_general_position
from tests.families import family
from tests.heads import HEADS
from tests.model.loss.loss_cases import LENGTH, N, batch_of, classes, generator, numbers, own_losses
from tests.reference import dense_hessian, relative_error


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return numbers(4, 5), classes(4, *shape)


class Grid(nn.Module):
    """(N, C, 2) logits: classes on axis 1, as PyTorch wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2 * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(len(x), CLASSES, 2)


def linear() -> nn.Module:
    return in_general_position(lambda: nn.Linear(5, CLASSES)).double()


def grid() -> nn.Module:
    return in_general_position(Grid).double()


def probabilities(*shape: int) -> Tensor:
    return numbers(*shape).softmax(1)


CRITERIA: dict[str, tuple[nn.Module, Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], str]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), linear, pair, "categorical"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.3), linear, pair, "categorical"),
    "ignored": (nn.CrossEntropyLoss(ignore_index=1), linear, pair, "categorical"),
    "smoothed and ignored": (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1), linear, pair, "categorical"),
    "positions": (nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=0), grid, lambda: pair(2), "categorical"),
    "probabilities": (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        linear,
        lambda: (numbers(4, 5), probabilities(4, CLASSES)),
        "categorical",
    ),
    "probabilities of positions": (
        nn.CrossEntropyLoss(),
        grid,
        lambda: (numbers(4, 5), probabilities(4, CLASSES, 2)),
        "categorical",
    ),
    "squares": (nn.MSELoss(), linear, lambda: (numbers(4, 5), numbers(4, CLASSES)), "gaussian"),
    "binary": (nn.BCEWithLogitsLoss(), linear, lambda: (numbers(4, 5), classes(4, CLASSES, count=2).double()), "bernoulli"),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_the_loss_it_computes(name: str):
    criterion, build, batch_of, kind = CRITERIA[name]
    model, (x, y) = build(), batch_of()
    found = Problem(model, [(x, y)], loss=criterion).objective((x, y))
    assert torch.allclose(found.total / found.num_targets.sum(), criterion(model(x), y), rtol=1e-12)
    assert found.predictive.likelihood == kind
    assert found.predictive.valid.sum(1).tolist() == found.num_targets.tolist()
    for i in range(4):
        if found.num_targets[i]:
            row = criterion(model(x[i : i + 1]), y[i : i + 1]) * found.num_targets[i]
            assert torch.allclose(found.per_sample[i], row, rtol=1e-12)
        else:
            assert found.per_sample[i] == 0
    assert torch.allclose(found.per_target.sum(1), found.per_sample)


@pytest.mark.parametrize("name", ["smoothed", "probabilities", "squares", "binary"])
def test_curvature_under_a_criterion(name: str):
    criterion, build, batch_of, _ = CRITERIA[name]
    model, (x, y) = build(), batch_of()
    truth = torch.linalg.eigvalsh(dense_hessian(model, lambda m: criterion(m(x), y), ["weight", "bias"])).flip(0)
    pairs = compute_spectrum(model, (x, y), loss=criterion, k=1, which="LA", tol=1e-8)
    assert relative_error(pairs.eigenvalues[:1], truth[:1]) < 1e-8
    # the model is linear: its Hessian is its GGN, and that the exact Fisher
    exact = compute_fisher_spectrum(model, (x, y), loss=criterion, fisher="exact").full.eigenvalues
    assert relative_error(exact, truth[: len(exact)]) < 1e-8


def test_smoothing_changes_the_empirical_fisher_and_no_other():
    model, batch = linear(), pair()
    plain, smoothed = (nn.CrossEntropyLoss(label_smoothing=share) for share in (0.0, 0.3))
    for fisher, same in (("exact", True), ("sampled", True), ("empirical", False)):
        found = [compute_fisher_spectrum(model, batch, loss=loss, fisher=fisher).full.eigenvalues for loss in (plain, smoothed)]
        assert (relative_error(*found) < 1e-9) == same


SMOOTHED = ["gpt2", "mistral", "roberta", "t5", "tokens", "causal classifier", "classifier", "vit", "multiple choice"]


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_the_models_own_loss_is_what_the_trainer_does(name: str, share: float):
    head = HEADS[name]
    model, batch, shifted = in_general_position(head.build).double(), batch_of(head), head.shifted
    loss = resolve_loss(nn.CrossEntropyLoss(label_smoothing=share), batch)
    with torch.no_grad():
        expected = LabelSmoother(epsilon=share)(model(**batch), batch["labels"], shift_labels=shifted)
        plain = own_losses(model, batch)
        for _ in range(2):
            found = loss(model, batch)
            assert torch.allclose(found.total / found.num_targets.sum(), expected.double(), rtol=1e-6)
            assert torch.equal(found.num_targets, plain.num_targets)
            assert torch.equal(found.predictive.logits, plain.predictive.logits)
            assert torch.equal(found.predictive.valid, plain.predictive.valid)
            assert torch.equal(found.per_target != 0, found.predictive.valid)
        for i in range(N):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            part = LabelSmoother(epsilon=share)(model(**row), row["labels"], shift_labels=shifted)
            if plain.num_targets[i]:
                assert float(found.per_sample[i]) == pytest.approx(float(part * plain.num_targets[i]), rel=1e-5)


@pytest.mark.parametrize("name", ["regression", "multi-label", "questions"])
def test_only_a_cross_entropy_of_labels_can_be_smoothed(name: str):
    batch = batch_of(HEADS[name])
    with pytest.raises(ConfigurationError, match=r"mean cross-entropy of `.logits` at `labels`"):
        resolve_loss(nn.CrossEntropyLoss(label_smoothing=0.1), batch)(in_general_position(HEADS[name].build).double(), batch)


def test_a_loss_that_is_not_finite_tells_no_shift_yet():
    model, batch = in_general_position(lambda: family("gpt2")), causal_batch(1, LENGTH, generator())
    loss = resolve_loss(nn.CrossEntropyLoss(label_smoothing=0.1), batch)
    weight = model.transformer.wte.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(torch.nan)
        with pytest.raises(ProbeError, match="cannot tell yet"):
            loss(model, batch)
        weight.copy_(kept)
        expected = LabelSmoother(epsilon=0.1)(model(**batch), batch["labels"], shift_labels=True)
        found = loss(model, batch)
    assert torch.allclose(found.total / found.num_targets.sum(), expected, rtol=1e-5)


class Own(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(CLASSES)), "has `weight`"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(CLASSES)), "has `pos_weight`"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(CLASSES)), "has `weight`"),
        (nn.CrossEntropyLoss(reduction="sum"), "must be 'mean', got 'sum'"),
        (nn.MSELoss(reduction="none"), "must be 'mean', got 'none'"),
        (nn.CrossEntropyLoss(label_smoothing=1.5), "between 0 and 1, got 1.5"),
        (nn.L1Loss(), "must be CrossEntropyLoss, MSELoss or BCEWithLogitsLoss"),
        (nn.NLLLoss(), "wrap it in a function"),
        (Own(), "wrap it in a function"),
    ],
)
def test_criteria_that_are_no_plain_mean(criterion: Any, message: str):
    with pytest.raises(ConfigurationError, match=message):
        Problem(linear(), [pair()], loss=criterion)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.MSELoss(), r"`loss`=MSELoss\(\) needs `\(inputs, targets\)` batches, got dict"),
        (nn.BCEWithLogitsLoss(), r"needs `\(inputs, targets\)` batches"),
        (nn.CrossEntropyLoss(ignore_index=0), "`ignore_index` of `loss` must be -100 on mapping batches"),
    ],
)
def test_criteria_that_mapping_batches_cannot_have(criterion: Any, message: str):
    with pytest.raises(ConfigurationError, match=message):
        Problem(in_general_position(lambda: family("gpt2")), [causal_batch(2, LENGTH, generator())], loss=criterion)


class Mine(nn.Module):
    """A module that is a loss function."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * 2


def test_a_module_may_be_a_loss_function():
    model, batch = CASES["mlp"].model(), CASES["mlp"].microbatches((4,))[0]
    found = Problem(model, [batch], loss=Mine()).objective(batch)
    assert torch.allclose(found.total, 2 * F.cross_entropy(model(batch[0]), batch[1], reduction="sum"))
