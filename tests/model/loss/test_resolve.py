"""Every form of the model's own loss: `sum total / sum num_targets` is `model(**batch).loss`, row by row and together."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, Problem
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from tests.cases import CASES, CLASSES, causal_batch, in_general_position
from tests.families import family
from tests.model.loss.form_cases import FORMS, LENGTH, generator
from tests.reference import row_loss, rows


def losses_of(model: nn.Module, batch: Any, **options: Any) -> SampleLosses:
    return Problem(model, [batch], **options).objective(batch)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", FORMS)
def test_the_mean_is_the_models_own_loss(name: str, size: int):
    build, batch_of, targets, known = FORMS[name]
    model, batch = in_general_position(build), batch_of(size)
    losses = losses_of(model, batch)
    assert losses.num_targets.shape == (size,)
    assert int(losses.num_targets.sum()) == targets(batch)
    assert torch.allclose(losses.total / losses.num_targets.sum(), model(**batch).loss, rtol=1e-5)
    assert (losses.per_sample is not None) == known


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form[3]])
def test_losses_of_single_rows(name: str):
    build, batch_of, targets, _ = FORMS[name]
    model, batch = in_general_position(build), batch_of(4)
    losses = losses_of(model, batch)
    for i in range(4):
        row = {key: values[i : i + 1] for key, values in batch.items()}
        assert int(losses.num_targets[i]) == targets(row)
        assert torch.allclose(losses.per_sample[i], model(**row).loss * targets(row), rtol=1e-4, atol=1e-5)
    assert torch.allclose(losses.total, losses.per_sample.sum())


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form[3]])
def test_losses_of_single_targets(name: str):
    build, batch_of, targets, _ = FORMS[name]
    model, batch = in_general_position(build), batch_of(4)
    losses = losses_of(model, batch)
    assert torch.allclose(losses.per_target.sum(1), losses.per_sample)
    assert not losses.per_target[~losses.predictive.valid].any()
    assert torch.equal(losses.predictive.valid.sum(1), losses.num_targets)
    assert losses.predictive.logits.shape[:2] == losses.per_target.shape
    kind = {"regression": "gaussian", "regression_of_several": "gaussian", "multi_label": "bernoulli"}.get(name, "categorical")
    assert losses.predictive.likelihood == kind
    if kind == "categorical":
        assert (losses.per_target > 0).sum() == targets(batch)


@pytest.mark.parametrize("name", CASES)
def test_every_case_agrees_with_the_oracle(name: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    objective = Problem(model, microbatches, loss=case.loss).objective
    with torch.no_grad():
        total = sum(objective(batch).total.item() for batch in microbatches)
        expected = sum(row_loss(model, row, case.kind).item() for row in rows(microbatches))
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("first", ["ignored", "padded"])
def test_the_form_does_not_depend_on_the_first_microbatch(first: str):
    """Where nothing tells shift from no shift, a later microbatch must."""
    model = in_general_position(lambda: family("gpt2"))
    unclear, clear = (causal_batch(2, LENGTH, generator()) for _ in range(2))
    unclear["labels"][:, (0 if first == "ignored" else 2) :] = -100
    problem = Problem(model, [unclear, clear])
    problem.objective(unclear)
    losses = problem.objective(clear)
    assert torch.allclose(losses.total / losses.num_targets.sum(), model(**clear).loss, rtol=1e-5)
    assert losses.per_sample is not None


def test_pairs_with_ignored_classes():
    model = CASES["mlp"].model()
    x, y = CASES["mlp"].microbatches((5,))[0]
    y[2] = -100
    losses = losses_of(model, (x, y), loss="cross_entropy")
    assert losses.num_targets.tolist() == [1, 1, 0, 1, 1]
    assert torch.allclose(losses.total / 4, F.cross_entropy(model(x), y))
    assert losses.per_sample[2] == 0


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_targets_of_one_output_may_leave_its_axis_out(loss: str, shape: tuple[int, ...]):
    """(N,) targets against (N, 1) outputs must not broadcast to (N, N)."""
    model = in_general_position(lambda: nn.Linear(5, 1)).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, *shape, dtype=torch.float64)
    function = {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}[loss]
    losses = losses_of(model, (x, y), loss=loss)
    assert torch.allclose(losses.total / 4, function(model(x)[:, 0], y.reshape(4)))


class WithLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(x))


def test_outputs_with_logits_are_understood():
    model = WithLogits().double()
    batch = CASES["mlp"].microbatches((3,))[0]
    assert torch.allclose(
        losses_of(model, batch, loss="cross_entropy").total / 3, F.cross_entropy(model(batch[0]).logits, batch[1])
    )


@pytest.mark.parametrize(("value", "known"), [(lambda losses: losses.mean(), False), (lambda losses: losses, True)])
def test_a_function_may_return_a_mean_or_one_loss_a_row(value: Callable[[Tensor], Tensor], known: bool):
    model, batch = CASES["mlp"].model(), CASES["mlp"].microbatches((4,))[0]
    losses = losses_of(model, batch, loss=lambda m, b: value(F.cross_entropy(m(b[0]), b[1], reduction="none")))
    assert torch.allclose(losses.total / 4, F.cross_entropy(model(batch[0]), batch[1]))
    assert losses.num_targets.tolist() == [1] * 4
    assert (losses.per_sample is not None) == known


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "cannot be determined"),
        ("hinge", "`loss` must be one of 'cross_entropy', 'mse', 'bce'"),
        (lambda model, batch: 3.0, "instead of a tensor"),
        (lambda model, batch: torch.zeros(2, 3), r"returned shape \(2, 3\) for a batch of 4 rows"),
    ],
)
def test_a_loss_that_cannot_be_determined(loss: Any, message: str):
    batch = CASES["mlp"].microbatches((4,))[0]
    with pytest.raises(ConfigurationError, match=message):
        losses_of(CASES["mlp"].model(), batch, loss=loss)


def test_a_named_loss_needs_pairs():
    with pytest.raises(ConfigurationError, match=r"\(inputs, targets\)"):
        losses_of(family("gpt2"), causal_batch(2, 4, generator()), loss="mse")


def test_a_batch_without_labels():
    batch = causal_batch(2, 4, generator())
    del batch["labels"]
    with pytest.raises(ConfigurationError, match="Add `labels`"):
        losses_of(family("gpt2"), batch)
