"""A user's own operators, with nothing in the package that knows of them."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks import (
    ConfigurationError,
    CurvatureMonitor,
    Eigenpairs,
    LinearCombination,
    MatrixOperator,
    Operator,
    Problem,
    RefusedError,
    TopEigenpairs,
)
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.operators.capabilities import SelfCheck, eigenpairs, self_check
from tests.problem.matrix_cases import D, everything, measured, microbatches, network, truth


def damped_hessian(problem: Problem, names: tuple[str, ...] | None) -> Operator:
    return LinearCombination([(1.0, problem.hessian(names))], shift=0.5)


def test_a_function_makes_a_matrix_of_ones_own():
    model = network()
    watching = CurvatureMonitor(
        model,
        probes=microbatches(),
        loss="cross_entropy",
        measure=[TopEigenpairs(operator=damped_hessian, k=2, tol=1e-7, max_matvecs=60, per_block=True)],
    )
    whole, *blocks = watching.step(0)[1:]
    values = torch.linalg.eigvalsh(truth("hessian"))
    assert whole.measurement == "damped_hessian"
    assert whole.scalars["lambda_max"] == pytest.approx(values[-1].item() + 0.5)
    assert whole.scalars["lambda_min"] == pytest.approx(values[0].item() + 0.5)
    assert [record.block for record in blocks] == ["0", "1", "3"]


def stretched(problem: Problem, names: tuple[str, ...] | None) -> Operator:
    """A matrix that is known entry by entry: the Gram of the gradient, and `1 / i` along parameter i."""
    g = torch.cat([problem.gradients[name].flatten() for name in names or problem.objective.parameters])
    return MatrixOperator(torch.outer(g, g) + torch.diag(1 / torch.arange(1, len(g) + 1).to(g)))


def test_a_matrix_that_is_known_entry_by_entry():
    model = network()
    watching = CurvatureMonitor(
        model,
        probes=microbatches(),
        loss="cross_entropy",
        measure=[TopEigenpairs(operator=stretched, k=2, which="LA", tol=1e-8, max_matvecs=60, per_block=True)],
    )
    whole, *blocks = watching.step(0)[1:]
    inputs, targets = everything(model)
    gradients = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))
    g = torch.cat([gradient.flatten() for gradient in gradients])
    values = torch.linalg.eigvalsh(torch.outer(g, g) + torch.diag(1 / torch.arange(1, 61).to(g)))
    assert whole.arrays["eigenvalues"] == pytest.approx(values.flip(0)[:2].tolist())
    assert whole.metadata["operator"] == whole.measurement == "stretched"
    assert [record.block for record in blocks] == ["0", "1", "3"]
    assert [record.metadata["num_params"] for record in blocks] == [30, 10, 20]


class SquaredHessian:
    """The protocol and nothing else, around an operator of the package: `H^2`."""

    is_psd = True

    def __init__(self, hessian: Operator) -> None:
        self._hessian = hessian
        self.shape, self.dtype, self.device = hessian.shape, hessian.dtype, hessian.device

    def matmat(self, V: Tensor) -> Tensor:
        return self._hessian.matmat(self._hessian.matmat(V))


class KnowingHessian(SquaredHessian):
    """Also checks itself, and has its pairs from those of H."""

    def self_check(self, seed: int) -> SelfCheck:
        return self_check(self._hessian, seed)

    def eigenpairs(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        pairs = eigenpairs(self._hessian, options, initial_vectors=initial_vectors)
        return replace(pairs, eigenvalues=pairs.eigenvalues**2, is_psd=True)


def squared(problem: Problem, names: tuple[str, ...] | None) -> Operator:
    return SquaredHessian(problem.hessian(names))


def knowing(problem: Problem, names: tuple[str, ...] | None) -> Operator:
    return KnowingHessian(problem.hessian(names))


@pytest.mark.parametrize("function", [squared, knowing])
def test_a_class_with_the_protocol_and_what_it_brings_along(function: Any):
    """Two probes: the second starts from the vector of the first."""
    measurement = TopEigenpairs(operator=function, k=1, which="LA", tol=1e-8, max_matvecs=60)
    watching = CurvatureMonitor(
        network(), probes=microbatches(), loss="cross_entropy", draw="fixed", when=1, measure=[measurement]
    )
    (first,), (second,) = (watching.step(step)[1:] for step in (0, 1))
    expected = torch.linalg.eigvalsh(truth("hessian"))[-1].item() ** 2
    for record in (first, second):
        assert record.measurement == function.__name__
        assert record.scalars["lambda_max"] == pytest.approx(expected)
        assert "most_negative_eigenvalue" not in record.scalars
    assert second.num_matvecs < first.num_matvecs - 3  # no self-check, and a start


def no_operator(problem: Problem, names: tuple[str, ...] | None) -> Any:
    return torch.eye(3)


def skewed(problem: Problem, names: tuple[str, ...] | None) -> Operator:
    return MatrixOperator(torch.triu(torch.ones(60, 60, dtype=D)))


def test_a_function_that_gives_no_operator_or_an_unsymmetric_one_is_refused():
    with pytest.raises(ConfigurationError, match="'no_operator' must give an operator"):
        measured(TopEigenpairs(operator=no_operator))
    with pytest.raises(RefusedError, match="not symmetric"):
        measured(TopEigenpairs(operator=skewed))


def test_a_function_without_a_name_is_refused():
    with pytest.raises(ConfigurationError, match="a function with a name"):
        TopEigenpairs(operator=partial(damped_hessian))
