"""Quality and numbers of `A x G` against dense matrices."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg.kronecker import Factor, KroneckerFactors, factor_of_matrix
from curvature_callbacks.statistics.kronecker_quality import Approximation, approximation, block_diagonal, kronecker_metrics
from tests.linalg.kronecker_cases import D, random_factors, semidefinite
from tests.reference import dense_fisher


def test_metrics_are_those_of_the_dense_product():
    found, product = random_factors()
    lam = np.linalg.eigvalsh(product.numpy())[::-1]
    a, g = (np.linalg.eigvalsh(m.numpy()) for m in (semidefinite(4), semidefinite(3, seed=1)))

    def effective(values: np.ndarray) -> float:
        p = values / values.sum()
        return float(np.prod(p**-p))

    assert kronecker_metrics(found, rank_cut=1e-12) == pytest.approx(
        {
            "lambda_max": lam[0],
            "trace": np.trace(product.numpy()),
            "frobenius_norm": np.linalg.norm(product.numpy()),
            "condition_number": lam[0] / lam[-1],
            "effective_rank": effective(lam),
            "input_condition_number": a[-1] / a[0],
            "output_condition_number": g[-1] / g[0],
            "input_effective_rank": effective(a),
            "output_effective_rank": effective(g),
        },
        rel=1e-8,
    )


def test_the_rank_cut_is_relative_and_per_factor():
    values = torch.tensor([1.0, 1e-2, 1e-5], dtype=D)
    axes = torch.arange(3)
    for scale in (1.0, 1e-9):
        found = KroneckerFactors(A=Factor(eigenvalues=scale * values, axes=axes), G=Factor(eigenvalues=values, axes=axes))
        metrics = kronecker_metrics(found, rank_cut=1e-4)
        assert metrics["input_condition_number"] == pytest.approx(100)
        assert metrics["condition_number"] == pytest.approx(1e4)
        assert kronecker_metrics(found, rank_cut=1e-6)["condition_number"] == pytest.approx(1e10)


def test_a_zero_factor_has_no_numbers():
    zero = factor_of_matrix(torch.zeros(2, 2), dtype=D)
    found = KroneckerFactors(A=zero, G=factor_of_matrix(torch.eye(2), dtype=D), corrected=torch.zeros(2, 0, dtype=D))
    assert kronecker_metrics(found, rank_cut=1e-6) == {}
    quality = approximation(found, torch.zeros(4, 4), normaliser=4)
    assert math.isnan(quality.kfac_cosine)
    assert math.isnan(quality.kfac_relative_error)
    assert math.isnan(quality.ekfac_cosine)
    assert math.isnan(quality.ekfac_relative_error)


def quality_of(seed: int) -> tuple[Approximation, Tensor, Tensor, Tensor]:
    """Of random factors for a random Fisher (unrelated to them), with the three dense matrices."""
    N, d_in, d_out = 5, 4, 3
    g = torch.randn(N, d_out * d_in, generator=torch.Generator().manual_seed(seed), dtype=D)
    fisher = dense_fisher(g)
    found, product = random_factors(d_in, d_out)
    assert found.A.basis is not None
    assert found.G.basis is not None
    U = torch.kron(found.G.basis, found.A.basis)
    diagonal = (U.T @ fisher @ U).diagonal()
    corrected = KroneckerFactors(A=found.A, G=found.G, corrected=diagonal.reshape(d_out, d_in))
    return approximation(corrected, g @ g.T, normaliser=N), fisher, product, U @ torch.diag(diagonal) @ U.T


def cosine(X: Tensor, Y: Tensor) -> float:
    return float((X * Y).sum() / (X.norm() * Y.norm()))


@pytest.mark.parametrize("seed", range(4))
def test_quality_is_that_of_the_dense_matrices(seed: int):
    found, fisher, product, ekfac = quality_of(seed)
    assert found.kfac_cosine == pytest.approx(cosine(fisher, product))
    assert found.kfac_relative_error == pytest.approx(float((fisher - product).norm() / fisher.norm()))
    assert found.ekfac_cosine == pytest.approx(cosine(fisher, ekfac))
    assert found.ekfac_relative_error == pytest.approx(float((fisher - ekfac).norm() / fisher.norm()))
    assert found.ekfac_relative_error <= found.kfac_relative_error
    assert 0 <= found.kfac_cosine <= found.ekfac_cosine <= 1


def test_quality_of_several_layers_is_that_of_the_block_diagonal_matrices():
    parts = [quality_of(seed) for seed in range(3)]
    fisher, product, ekfac = (torch.block_diag(*(part[i] for part in parts)) for i in (1, 2, 3))
    found = block_diagonal(part[0] for part in parts)
    assert found.kfac_cosine == pytest.approx(cosine(fisher, product))
    assert found.kfac_relative_error == pytest.approx(float((fisher - product).norm() / fisher.norm()))
    assert found.ekfac_cosine == pytest.approx(cosine(fisher, ekfac))
    assert found.ekfac_relative_error == pytest.approx(float((fisher - ekfac).norm() / fisher.norm()))


def test_rounding_below_zero_is_no_error():
    exact = Approximation(fisher_squared=1.0, kfac_squared=1.0, ekfac_squared=1.0 + 1e-15, inner=1.0 + 1e-15)
    assert exact.kfac_relative_error == exact.ekfac_relative_error == 0.0
