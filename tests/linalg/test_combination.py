import math
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature_callbacks import ConfigurationError, MatrixOperator
from curvature_callbacks.linalg.combination import LinearCombination
from curvature_callbacks.linalg.lanczos.solver import lanczos
from curvature_callbacks.linalg.operator import Operator

P = 7


def symmetric(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    matrix = torch.randn(P, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix + matrix.T).to(dtype)


@pytest.mark.parametrize("shift", [0.0, -1.5])
@pytest.mark.parametrize("weights", [(1.0,), (2.0, -0.5), (0.25, 0.0, 3)])
def test_products_are_those_of_the_dense_sum(weights: tuple[float, ...], shift: float):
    matrices = [symmetric(i) for i in range(len(weights))]
    operator = LinearCombination([(c, MatrixOperator(A)) for c, A in zip(weights, matrices, strict=True)], shift=shift)
    expected = torch.diag(torch.full((P,), shift, dtype=torch.float64))
    for c, A in zip(weights, matrices, strict=True):
        expected = expected + c * A
    V = torch.randn(P, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    kept = V.clone()
    assert isinstance(operator, Operator)
    assert torch.allclose(operator.matmat(V), expected @ V, rtol=1e-12, atol=1e-12)
    assert torch.equal(V, kept)


def test_combinations_nest_and_have_eigenvalues():
    inner = LinearCombination([(1.0, MatrixOperator(symmetric(0)))], shift=2.0)
    operator = LinearCombination([(-1.0, inner), (0.5, MatrixOperator(symmetric(1)))])
    truth = torch.linalg.eigvalsh(-symmetric(0) - 2 * torch.eye(P) + 0.5 * symmetric(1)).flip(0)
    assert torch.allclose(lanczos(operator, k=2, tol=1e-8).eigenvalues, truth[:2])


@pytest.mark.parametrize(
    ("weights", "psd", "shift", "expected"),
    [
        ((1.0, 2.0), (True, True), 0.0, True),
        ((0.0, 2.0), (True, True), 0.5, True),
        ((1.0, 2.0), (True, False), 0.0, False),
        ((1.0, -2.0), (True, True), 0.0, False),
        ((1.0, 2.0), (True, True), -1e-9, False),
    ],
)
def test_what_is_known_to_be_positive(weights: Any, psd: Any, shift: float, expected: bool):
    parts = [(c, MatrixOperator(torch.eye(P), is_psd=known)) for c, known in zip(weights, psd, strict=True)]
    assert LinearCombination(parts, shift=shift).is_psd is expected


def test_it_looks_like_its_parts():
    operator = LinearCombination([(1.0, MatrixOperator(symmetric(0, torch.float32)))], shift=1)
    assert operator.shape == (P, P)
    assert operator.dtype == torch.float32
    assert operator.device == torch.device("cpu")
    assert operator.matmat(torch.ones(P, 1)).dtype == torch.float32


@pytest.mark.parametrize(
    ("parts", "shift", "message"),
    [
        ([], 1.0, "at least one"),
        ([(1.0, MatrixOperator(torch.eye(3))), (1.0, MatrixOperator(torch.eye(2)))], 0.0, r"same shape: number 1 has \(2, 2\)"),
        ([(1.0, MatrixOperator(torch.eye(3))), (1.0, MatrixOperator(torch.eye(3).double()))], 0.0, "same dtype"),
        ([(1.0, MatrixOperator(torch.eye(3))), (1.0, MatrixOperator(torch.eye(3, device="meta")))], 0.0, "same device"),
        ([(math.nan, MatrixOperator(torch.eye(3)))], 0.0, "weight 0 of `parts` must be a finite"),
        ([(1.0, MatrixOperator(torch.eye(3)))], math.inf, "`shift` must be a finite number, got inf"),
    ],
)
def test_parts_that_do_not_fit(parts: Any, shift: float, message: str):
    with pytest.raises(ConfigurationError, match=message):
        LinearCombination(parts, shift=shift)
