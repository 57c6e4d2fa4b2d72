"""The GGN and the Fishers of the heads of Hugging Face, whose losses have a shift and a likelihood of their own.

The oracle takes the logits of one row, and of those one after the other, and writes the loss of each target out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import ConfigurationError, Problem
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator, SampledFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from tests.cases import in_general_position
from tests.heads import HEADS, Batch, outputs_and_labels
from tests.reference import IGNORED, float64_copy, jacobian, relative_error, rows

SIZES, LENGTHS = (2, 1, 1), (6, 3, 5)  # so that every microbatch has another number of targets
TOLERANCE = 1e-5  # float32 inside Hugging Face's norms, rotary embeddings and losses
SMALL = 24  # elements of the parameters to differentiate by
DRAWS = 150
# One head of every task; the others are variations.
TASKS = ("gpt2", "roberta", "t5", "tokens", "classifier", "multi-label", "regression of several", "vit", "questions")
REST_BY_UNIT = [
    pytest.param(name, unit, marks=pytest.mark.slow)
    for name in HEADS
    for unit in ("sequence", "token")
    if not (name in TASKS and unit == "token") and (name, unit) not in (("gpt2", "sequence"), ("multi-label", "sequence"))
]
ALL = [name if name in TASKS else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]


def microbatches(name: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [HEADS[name].batch(size, length, generator) for size, length in zip(SIZES, LENGTHS, strict=True)]


def model_of(name: str) -> nn.Module:
    return in_general_position(HEADS[name].build).double()


def block_of(model: nn.Module) -> list[str]:
    """The first small norm, so that the whole model lies between it and the loss, and the last two small parameters."""
    small = [name for name, parameter in model.named_parameters() if parameter.numel() <= SMALL]
    norm = next(name for name in small if "norm" in name.lower() or "ln_" in name)
    return [name for name in small if name == norm or name in small[-2:]]


@contextmanager
def problem_of(name: str, loss: Any = None) -> Iterator[tuple[Problem, list[str]]]:
    model = model_of(name)
    with offline_problem(model, microbatches(name), loss=loss, params_filter=None) as problem:
        yield problem, block_of(model)


def target_loss(likelihood: str, z: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Of logits z (C,), and y a class or (C,)."""
    if likelihood == "gaussian":
        return (z - y).square().sum() / len(z)
    if likelihood == "bernoulli":
        return ((1 + z.exp()).log() - y * z).sum() / len(z)
    labels = torch.full_like(z, smoothing / len(z))
    labels[y] += 1 - smoothing
    return z.exp().sum().log() - labels @ z


@dataclass(frozen=True)
class Truth:
    """Dense matrices over the block."""

    ggn: Tensor
    token: Tensor
    sequence: Tensor
    mean_loss: float
    num_targets: int


@cache
def truth_of(name: str, smoothing: float = 0.0) -> Truth:
    head, model = HEADS[name], float64_copy(model_of(name))
    leaves = [dict(model.named_parameters())[parameter] for parameter in block_of(model)]
    ggn, row_gradients, target_gradients, losses = 0.0, [], [], []
    for row in rows(microbatches(name)):
        logits, labels = outputs_and_labels(model, row, head.shifted)
        for z, y in zip(logits[0], labels[0], strict=True):
            if head.kind == "categorical" and int(y) == IGNORED:
                continue
            y = int(y) if head.kind == "categorical" else y
            J, at = jacobian(z, leaves), z.detach().double().requires_grad_()
            loss = target_loss(head.kind, at, y, smoothing)
            (slope,) = torch.autograd.grad(loss, at)
            ggn = ggn + J.T @ torch.autograd.functional.hessian(lambda x, y=y: target_loss(head.kind, x, y, smoothing), at) @ J
            target_gradients.append(J.T @ slope)
            losses.append(loss.item())
        row_gradients.append(torch.stack(target_gradients[sum(len(part) for part in row_gradients) :]))
    G, n = torch.stack([part.sum(0) for part in row_gradients]), len(losses)
    token = torch.stack(target_gradients)
    return Truth(ggn / n, token.T @ token / n, G.T @ G / len(G), sum(losses) / n, n)


def vectors(truth: Truth, count: int = 4) -> Tensor:
    return torch.randn(len(truth.ggn), count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_products_are_those_of_the_dense_matrices(name: str):
    truth = truth_of(name)
    V = vectors(truth)
    with problem_of(name) as (problem, block):
        ggn = GGNOperator(problem.objective, problem.microbatches, block)
        assert ggn.num_targets == truth.num_targets
        assert relative_error(ggn.matmat(V), truth.ggn @ V) < TOLERANCE
        for unit, expected in (("sequence", truth.sequence), ("token", truth.token)):
            fisher = EmpiricalFisherOperator(problem.objective, problem.microbatches, block, sample_unit=unit)
            assert fisher.normaliser == (sum(SIZES) if unit == "sequence" else truth.num_targets)
            assert relative_error(fisher.matmat(V), expected @ V) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_the_loss_of_the_oracle_is_that_of_the_model(name: str):
    """Whose `.loss` is a mean over its batch, here of one row: `sum_i n_i loss_i / sum_i n_i` over all."""
    head, model, total, count = HEADS[name], model_of(name), 0.0, 0
    for row in rows(microbatches(name)):
        _, labels = outputs_and_labels(model, row, head.shifted)
        n = int((labels != IGNORED).sum()) if head.kind == "categorical" else 1
        total, count = total + n * model(**row).loss.item(), count + n
    assert count == truth_of(name).num_targets
    assert total / count == pytest.approx(truth_of(name).mean_loss, rel=1e-6)


def quadratic_forms(operator: SampledFisherOperator, problem: Problem, v: Tensor) -> Tensor:
    """(DRAWS,) `v' F v` of every draw by itself."""
    values, forms = operator.jvp(v), torch.zeros(DRAWS, dtype=torch.float64)
    for batch in problem.microbatches:
        valid = problem.objective(batch).predictive.valid
        size = DRAWS * (valid.numel() if operator.sample_unit == "token" else len(valid))
        forms += values[:size].reshape(DRAWS, -1).square().sum(1)
        values = values[size:]
    assert len(values) == 0
    return forms * DRAWS / operator.normaliser


@pytest.mark.parametrize(
    ("name", "unit"), [*((name, "token") for name in TASKS), ("gpt2", "sequence"), ("multi-label", "sequence"), *REST_BY_UNIT]
)
def test_sampled_fishers_average_to_the_ggn(name: str, unit: Any):
    """Targets are drawn independently: over sequences the mean is the GGN of the summed loss, `sum_i n_i / N` times larger."""
    truth = truth_of(name)
    v = vectors(truth, 1)[:, 0]
    expected = v @ truth.ggn @ v * (truth.num_targets / sum(SIZES) if unit == "sequence" else 1.0)
    with problem_of(name) as (problem, block):
        operator = SampledFisherOperator(problem.objective, problem.microbatches, block, sample_unit=unit, num_draws=DRAWS)
        forms = quadratic_forms(operator, problem, v)
        assert (v @ operator.matmat(v[:, None])).item() == pytest.approx(forms.mean().item(), rel=1e-6)
    error = forms.std() / DRAWS**0.5
    assert error < 0.2 * expected
    assert abs(forms.mean() - expected) < 4 * error


@pytest.mark.parametrize("name", ["gpt2", "t5", "classifier"])
def test_smoothed_labels_change_the_empirical_fisher_alone(name: str):
    """And that as written out: the label's share `1 - s`, and `s / C` for every class."""
    plain, smoothed = truth_of(name), truth_of(name, 0.3)
    V = vectors(plain)
    with problem_of(name, nn.CrossEntropyLoss(label_smoothing=0.3)) as (problem, block):
        parts = problem.objective, problem.microbatches, block
        assert relative_error(GGNOperator(*parts).matmat(V), plain.ggn @ V) < TOLERANCE
        for unit, expected, other in (
            ("sequence", smoothed.sequence, plain.sequence),
            ("token", smoothed.token, plain.token),
        ):
            found = EmpiricalFisherOperator(*parts, sample_unit=unit).matmat(V)
            assert relative_error(found, expected @ V) < TOLERANCE
            assert relative_error(found, other @ V) > 1e-2
        drawn = SampledFisherOperator(*parts, seed=3).matmat(V)
    with problem_of(name) as (problem, block):
        assert torch.equal(SampledFisherOperator(problem.objective, problem.microbatches, block, seed=3).matmat(V), drawn)


def test_a_loss_of_no_standard_form_is_asked_for():
    with problem_of("gpt2", lambda model, batch: model(**batch).loss) as (problem, block):
        for cls in (GGNOperator, SampledFisherOperator, EmpiricalFisherOperator):
            with pytest.raises(ConfigurationError, match="loss"):
                cls(problem.objective, problem.microbatches, block)
