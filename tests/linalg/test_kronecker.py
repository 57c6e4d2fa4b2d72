import math

import numpy as np
import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg import kronecker as module
from curvature_callbacks.linalg.kronecker import (
    Factor,
    KroneckerFactors,
    factor_of_diagonal,
    factor_of_matrix,
    factor_of_rows,
    outer_pairs,
    top_corrected_eigenvalues,
    top_eigenvalues,
)
from curvature_callbacks.statistics.kronecker_quality import Approximation, approximation, block_diagonal
from tests.reference import dense_fisher

D = torch.float64


def semidefinite(d: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    X = torch.randn(rank or 2 * d, d, generator=torch.Generator().manual_seed(seed), dtype=D)
    return X.T @ X / len(X)


def dense(factor: Factor) -> Tensor:
    assert factor.basis is not None
    return factor.basis @ torch.diag(factor.eigenvalues) @ factor.basis.T


def factors(d_in: int = 4, d_out: int = 3, *, rank: int | None = None) -> tuple[KroneckerFactors, Tensor]:
    """With the dense (P, P) product for row-major matrices (d_out, d_in)."""
    A, G = semidefinite(d_in, rank=rank), semidefinite(d_out, seed=1)
    found = KroneckerFactors(A=factor_of_matrix(A, dtype=D), G=factor_of_matrix(G, dtype=D))
    return found, torch.kron(G, A)


@pytest.mark.parametrize(("n", "d"), [(9, 4), (4, 9), (1, 5), (5, 1)])
def test_rows_and_matrix_give_the_eigenpairs_of_the_same_factor(n: int, d: int):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=D)
    matrix = 0.3 * rows.T @ rows
    for found in (factor_of_rows(rows, scale=0.3), factor_of_matrix(matrix, dtype=D)):
        assert len(found.eigenvalues) == min(n, d)
        assert (found.eigenvalues.diff() <= 0).all()
        assert torch.allclose(dense(found), matrix)
        assert torch.allclose(found.basis.T @ found.basis, torch.eye(min(n, d), dtype=D), atol=1e-12)


def test_rows_are_taken_in_chunks_of_columns(monkeypatch: pytest.MonkeyPatch):
    rows = torch.randn(4, 23, generator=torch.Generator().manual_seed(0), dtype=D)
    monkeypatch.setattr(module, "_CHUNK", 5)
    assert torch.allclose(dense(factor_of_rows(rows, scale=2.0)), 2 * rows.T @ rows)


def test_rows_of_single_precision_keep_an_orthonormal_basis():
    """Eigenvalues down to 1e-8 of the largest, which are rounding in float32 products."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q * torch.logspace(0, -4, 6)
    rows = mixed @ torch.randn(6, 200, generator=generator)
    basis = factor_of_rows(rows, scale=1.0).basis
    assert basis is not None
    assert basis.dtype == torch.float32
    assert torch.allclose(basis.T @ basis, torch.eye(6), atol=1e-5)


def test_zero_directions_are_left_out():
    assert len(factor_of_matrix(semidefinite(6, rank=2), dtype=D).eigenvalues) == 2
    assert len(factor_of_rows(torch.ones(3, 7, dtype=D), scale=1.0).eigenvalues) == 1
    for empty in (factor_of_matrix(torch.zeros(3, 3), dtype=D), factor_of_rows(torch.zeros(2, 3), scale=1.0)):
        assert len(empty.eigenvalues) == 0


def test_what_is_not_finite_gives_nan_and_does_not_raise():
    rows = torch.tensor([[1.0, torch.inf, 0.0], [1.0, 2.0, 0.0]], dtype=D)
    for found in (factor_of_rows(rows, scale=1.0), factor_of_matrix(rows.T @ rows, dtype=D)):
        assert len(found.eigenvalues) == 1
        assert found.eigenvalues.isnan().all()
        assert found.rotated(torch.ones(3, dtype=D)).isnan().tolist() == [True]


def test_a_diagonal_factor_is_its_sorted_positive_entries():
    found = factor_of_diagonal(torch.tensor([0.5, 0.0, 2.0, 1.0]))
    assert found.eigenvalues.tolist() == [2.0, 1.0, 0.5]
    assert found.axes is not None
    assert found.axes.tolist() == [2, 3, 0]
    assert found.rotated(torch.tensor([10.0, 11.0, 12.0, 13.0])).tolist() == [12.0, 13.0, 10.0]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("k", [1, 2, 5, 12, 50])
def test_top_eigenvalues_are_those_of_the_dense_product(k: int, rank: int | None):
    found, product = factors(rank=rank)
    values = torch.linalg.eigvalsh(product).flip(0)
    values = values[values > 1e-12][:k]
    assert torch.allclose(top_eigenvalues(found, k), values)


def test_top_eigenvalues_of_long_lists_form_no_product():
    """200 000 x 200 000 pairs; the k largest lie in the first k of each list."""
    values = torch.linspace(3, 0.001, 200_000, dtype=D)
    axes = torch.arange(len(values))
    found = KroneckerFactors(A=Factor(eigenvalues=values, axes=axes), G=Factor(eigenvalues=values.square(), axes=axes))
    expected = torch.outer(values[:300], values[:300].square()).flatten().sort(descending=True).values[:300]
    assert torch.allclose(top_eigenvalues(found, 300), expected)


def test_metrics_are_those_of_the_dense_product():
    found, product = factors()
    lam = np.linalg.eigvalsh(product.numpy())[::-1]
    a, g = (np.linalg.eigvalsh(m.numpy()) for m in (semidefinite(4), semidefinite(3, seed=1)))

    def effective(values: np.ndarray) -> float:
        p = values / values.sum()
        return float(np.prod(p**-p))

    assert found.metrics(rank_cut=1e-12) == pytest.approx(
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
        metrics = found.metrics(rank_cut=1e-4)
        assert metrics["input_condition_number"] == pytest.approx(100)
        assert metrics["condition_number"] == pytest.approx(1e4)
        assert found.metrics(rank_cut=1e-6)["condition_number"] == pytest.approx(1e10)


def test_a_zero_factor_has_no_numbers():
    zero = factor_of_matrix(torch.zeros(2, 2), dtype=D)
    found = KroneckerFactors(A=zero, G=factor_of_matrix(torch.eye(2), dtype=D), corrected=torch.zeros(2, 0, dtype=D))
    assert found.metrics(rank_cut=1e-6) == {}
    assert len(top_eigenvalues(found, 3)) == len(top_corrected_eigenvalues(found, 3)) == 0
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
    found, product = factors(d_in, d_out)
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


def test_corrected_eigenvalues_are_sorted():
    found, _ = factors()
    values = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    corrected = KroneckerFactors(A=found.A, G=found.G, corrected=values)
    for k in (1, 5, 99):
        assert torch.equal(top_corrected_eigenvalues(corrected, k), values.flatten().sort(descending=True).values[:k])


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_outer_pairs_name_the_eigenvectors_of_the_dense_product(k: int, rank: int | None, largest: bool):
    found, product = factors(rank=rank)
    values = torch.linalg.eigvalsh(product)
    values = values[values > 1e-12]
    pairs = outer_pairs(found, k, largest=largest)
    assert torch.allclose(pairs.eigenvalues, (values.flip(0) if largest else values)[:k])
    for value, j, i in zip(pairs.eigenvalues, pairs.outputs, pairs.inputs, strict=True):
        u = torch.outer(found.G.basis[:, j], found.A.basis[:, i]).flatten()
        assert torch.allclose(product @ u, value * u, atol=1e-12)
    assert len({(int(j), int(i)) for j, i in zip(pairs.outputs, pairs.inputs, strict=True)}) == len(pairs.eigenvalues)


@pytest.mark.parametrize("largest", [True, False])
def test_outer_pairs_of_ekfac_are_the_entries_they_name(largest: bool):
    plain, _ = factors()
    values = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    pairs = outer_pairs(KroneckerFactors(A=plain.A, G=plain.G, corrected=values), 5, corrected=True, largest=largest)
    assert torch.equal(pairs.eigenvalues, values[pairs.outputs, pairs.inputs])
    assert torch.equal(pairs.eigenvalues, values.flatten().sort(descending=largest).values[:5])


def test_coordinates_and_vectors_are_inverse_within_the_rank():
    A = semidefinite(5, rank=3)
    full = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=D)
    values, vectors = torch.linalg.eigh(A)
    inside = vectors[:, values > 1e-12]
    found = factor_of_matrix(A, dtype=D)
    assert torch.allclose(found.restored(found.rotated(full), 5), full @ inside @ inside.T)
    diagonal = factor_of_diagonal(torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0], dtype=D))
    kept = full * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=D)
    assert torch.equal(diagonal.restored(diagonal.rotated(full), 5), kept)


def test_a_factor_changes_its_precision():
    for found in (factor_of_matrix(semidefinite(3), dtype=D), factor_of_diagonal(torch.tensor([1.0, 2.0]))):
        moved = found.to(torch.device("cpu"), torch.float32)
        assert moved.eigenvalues.dtype == D
        assert (moved.basis is None) == (found.basis is None)
        assert moved.basis is None or moved.basis.dtype == torch.float32
