"""Linear, logistic and softmax regression, where every curvature matrix can be written out.

`z = W x + b`, in the rows `(x, 1)` of X: each matrix is a sum of `B_t x (x, 1)(x, 1)'` over targets t, with B_t the Hessian
of the loss in z for the Hessian and the GGN, and the outer product of its slopes for the Fishers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import Problem
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator, SampledFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.hessian import HessianOperator
from tests.cases import in_general_position
from tests.operators.operator_cases import dense
from tests.reference import IGNORED, relative_error

INPUTS, T = 3, 4
SIZES = (3, 1, 2)
N = sum(SIZES)


class Regression(nn.Module):
    """Of rows (N, d), or of positions (N, T, d) as a convolution has them: with the outputs on axis 1, in memory too."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.ndim == 2 else F.conv1d(x.mT, self.layer.weight[:, :, None], self.layer.bias)


@dataclass(frozen=True)
class Case:
    """A loss with the Hessian and the slope it has in the outputs z (C,) of one target y."""

    loss: Any
    outputs: int
    labels: Callable[[int, torch.Generator], Tensor]
    hessian: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    positions: bool = False

    def microbatches(self) -> list[tuple[Tensor, Tensor]]:
        generator, shape = torch.Generator().manual_seed(0), (T, INPUTS) if self.positions else (INPUTS,)
        inputs = [torch.randn(size, *shape, generator=generator, dtype=torch.float64) for size in SIZES]
        return [(x, self.labels(len(x), generator)) for x in inputs]

    def model(self) -> Regression:
        return in_general_position(lambda: Regression(self.outputs)).double()


def of_softmax(z: Tensor) -> Tensor:
    p = z.exp() / z.exp().sum()
    return torch.diag(p) - torch.outer(p, p)


def minus_labels(z: Tensor, labels: Tensor) -> Tensor:
    return z.exp() / z.exp().sum() - labels


def one_hot(y: Tensor, C: int) -> Tensor:
    return torch.eye(C, dtype=torch.float64)[int(y)]


def logistic(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


def some_ignored(size: int, generator: torch.Generator) -> Tensor:
    labels = torch.randint(3, (size, T), generator=generator)
    labels[0, 1] = labels[-1, 2:] = IGNORED
    return labels


REGRESSIONS = {
    "linear": Case(
        "mse",
        2,
        lambda size, generator: torch.randn(size, 2, generator=generator, dtype=torch.float64),
        lambda z: torch.eye(2, dtype=torch.float64) * 2 / 2,
        lambda z, y: 2 * (z - y) / 2,
    ),
    "logistic": Case(
        "bce",
        2,
        lambda size, generator: torch.randint(2, (size, 2), generator=generator).double(),
        lambda z: torch.diag(logistic(z) * (1 - logistic(z))) / 2,
        lambda z, y: (logistic(z) - y) / 2,
    ),
    "softmax": Case(
        "cross_entropy",
        3,
        lambda size, generator: torch.randint(3, (size,), generator=generator),
        of_softmax,
        lambda z, y: minus_labels(z, one_hot(y, 3)),
    ),
    "softmax of smoothed labels": Case(
        nn.CrossEntropyLoss(label_smoothing=0.3),
        3,
        lambda size, generator: torch.randint(3, (size,), generator=generator),
        of_softmax,
        lambda z, y: minus_labels(z, 0.7 * one_hot(y, 3) + 0.1),
    ),
    "softmax of probabilities": Case(
        "cross_entropy",
        3,
        lambda size, generator: torch.rand(size, 3, generator=generator).double().softmax(1),
        of_softmax,
        minus_labels,
    ),
    "softmax of positions": Case(
        "cross_entropy", 3, some_ignored, of_softmax, lambda z, y: minus_labels(z, one_hot(y, 3)), positions=True
    ),
}


@dataclass(frozen=True)
class Target:
    """Of a row, its input with the 1 behind it, and the Hessian and slope of its loss in its outputs."""

    row: int
    input: Tensor  # (d + 1,)
    hessian: Tensor  # (C, C)
    slope: Tensor  # (C,)

    @property
    def gradient(self) -> Tensor:
        return torch.kron(self.slope, self.input)


def targets_of(case: Case) -> list[Target]:
    model, found, row = case.model(), [], 0
    W, b = model.layer.weight.detach(), model.layer.bias.detach()
    for inputs, labels in case.microbatches():
        for x_row, y_row in zip(inputs, labels, strict=True):
            for x, y in zip(x_row, y_row, strict=True) if case.positions else [(x_row, y_row)]:
                if not (case.positions and int(y) == IGNORED):
                    z = W @ x + b
                    found.append(Target(row, torch.cat([x, x.new_ones(1)]), case.hessian(z), case.slope(z, y)))
            row += 1
    return found


def in_order(matrix: Tensor, outputs: int) -> Tensor:
    """From (output, input and 1) to the order of the parameters: all of W, then b."""
    index = torch.arange(len(matrix)).reshape(outputs, INPUTS + 1)
    order = torch.cat([index[:, :INPUTS].flatten(), index[:, INPUTS]])
    return matrix[order[:, None], order]


def ggn_of(case: Case) -> Tensor:
    targets = targets_of(case)
    total = sum(torch.kron(target.hessian, torch.outer(target.input, target.input)) for target in targets)
    return in_order(total / len(targets), case.outputs)


def fisher_of(case: Case, unit: str) -> Tensor:
    targets = targets_of(case)
    gradients = [target.gradient for target in targets]
    if unit == "sequence":
        gradients = [sum(target.gradient for target in targets if target.row == row) for row in range(N)]
    return in_order(sum(torch.outer(g, g) for g in gradients) / len(gradients), case.outputs)


@contextmanager
def problem_of(case: Case) -> Iterator[Problem]:
    with offline_problem(case.model(), case.microbatches(), loss=case.loss, params_filter=None) as problem:
        yield problem


@pytest.mark.parametrize("name", REGRESSIONS)
def test_hessian_and_ggn_are_one(name: str):
    case = REGRESSIONS[name]
    expected = ggn_of(case)
    with problem_of(case) as problem:
        for cls, tolerance in ((GGNOperator, 1e-12), (HessianOperator, 1e-12), (FiniteDifferenceHessianOperator, 1e-6)):
            assert relative_error(dense(cls(problem.objective, problem.microbatches)), expected) < tolerance


def test_of_linear_regression_it_is_the_gram_of_the_inputs():
    """`2 X'X / (N D) x I`, whatever the labels."""
    case = REGRESSIONS["linear"]
    X = torch.cat([torch.cat([x, x.new_ones(len(x), 1)], dim=1) for x, _ in case.microbatches()])
    expected = in_order(torch.kron(torch.eye(2, dtype=torch.float64), 2 * X.T @ X / (N * 2)), 2)
    with problem_of(case) as problem:
        assert relative_error(dense(GGNOperator(problem.objective, problem.microbatches)), expected) < 1e-12


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_the_empirical_fisher_has_its_closed_form(name: str, unit: Any):
    case = REGRESSIONS[name]
    with problem_of(case) as problem:
        operator = EmpiricalFisherOperator(problem.objective, problem.microbatches, sample_unit=unit)
        assert relative_error(dense(operator), fisher_of(case, unit)) < 1e-12


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("linear", "sequence"),
        ("logistic", "token"),
        ("softmax", "token"),
        ("softmax of positions", "sequence"),
        ("softmax of positions", "token"),
    ],
)
def test_sampled_fishers_of_many_seeds_average_to_the_ggn(name: str, unit: Any):
    """Entry by entry. Over sequences, the GGN of the summed loss by the row."""
    case, num_seeds = REGRESSIONS[name], 60
    expected = ggn_of(case) * (len(targets_of(case)) / N if unit == "sequence" else 1)
    with problem_of(case) as problem:
        seeds = range(0, num_seeds * len(SIZES), len(SIZES))  # the microbatch at place b draws with seed + b
        parts = problem.objective, problem.microbatches
        found = [dense(SampledFisherOperator(*parts, sample_unit=unit, seed=seed)) for seed in seeds]
    samples = torch.stack(found)
    error = samples.std(0) / num_seeds**0.5
    assert error.max() < 0.25 * expected.abs().max()
    assert ((samples.mean(0) - expected).abs() < 4.5 * error).all()


@pytest.mark.parametrize("name", ["softmax", "softmax of positions"])
def test_the_expectation_over_labels_is_the_ggn(name: str):
    """The exact Fisher of targets: the empirical ones of one target at each label, weighted by its probability."""
    case = REGRESSIONS[name]
    model, total, n = case.model(), 0.0, 0
    for x, y in case.microbatches():
        probabilities = model(x).detach().softmax(1).movedim(1, -1)  # (N, [T,] C)
        for place in (y != IGNORED).nonzero():
            for c, p in enumerate(probabilities[tuple(place)]):
                labels = torch.full_like(y, IGNORED)
                labels[tuple(place)] = c
                with offline_problem(model, [(x, labels)], loss="cross_entropy", params_filter=None) as problem:
                    total = total + p * dense(EmpiricalFisherOperator(problem.objective, [(x, labels)], sample_unit="token"))
            n += 1
    with problem_of(case) as problem:
        assert relative_error(dense(GGNOperator(problem.objective, problem.microbatches)), total / n) < 1e-12
