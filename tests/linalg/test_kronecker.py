"""Factors by their eigenpairs."""

import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg.kronecker import Factor, factor_of_diagonal, factor_of_matrix, factor_of_vectors
from tests.linalg.kronecker_cases import D, semidefinite


def as_matrix(factor: Factor) -> Tensor:
    assert factor.basis is not None
    return factor.basis @ torch.diag(factor.eigenvalues) @ factor.basis.T


@pytest.mark.parametrize(("n", "d"), [(9, 4), (4, 9), (1, 5), (5, 1)])
def test_rows_and_matrix_give_the_eigenpairs_of_the_same_factor(n: int, d: int):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=D)
    matrix = 0.3 * rows.T @ rows
    for found in (factor_of_vectors(rows, scale=0.3), factor_of_matrix(matrix, dtype=D)):
        assert len(found.eigenvalues) == min(n, d)
        assert (found.eigenvalues.diff() <= 0).all()
        assert torch.allclose(as_matrix(found), matrix)
        assert torch.allclose(found.basis.T @ found.basis, torch.eye(min(n, d), dtype=D), atol=1e-12)


def test_rows_are_taken_in_chunks_of_columns():
    rows = torch.randn(4, 23, generator=torch.Generator().manual_seed(0), dtype=D)
    assert torch.allclose(as_matrix(factor_of_vectors(rows, scale=2.0, chunk=5)), 2 * rows.T @ rows)


def test_rows_of_single_precision_keep_an_orthonormal_basis():
    """Eigenvalues down to 1e-8 of the largest, which are rounding in float32 products."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q * torch.logspace(0, -4, 6)
    rows = mixed @ torch.randn(6, 200, generator=generator)
    basis = factor_of_vectors(rows, scale=1.0).basis
    assert basis is not None
    assert basis.dtype == torch.float32
    assert torch.allclose(basis.T @ basis, torch.eye(6), atol=1e-5)


def test_zero_directions_are_left_out():
    assert len(factor_of_matrix(semidefinite(6, rank=2), dtype=D).eigenvalues) == 2
    assert len(factor_of_vectors(torch.ones(3, 7, dtype=D), scale=1.0).eigenvalues) == 1
    for empty in (factor_of_matrix(torch.zeros(3, 3), dtype=D), factor_of_vectors(torch.zeros(2, 3), scale=1.0)):
        assert len(empty.eigenvalues) == 0


def test_what_is_not_finite_gives_nan_and_does_not_raise():
    rows = torch.tensor([[1.0, torch.inf, 0.0], [1.0, 2.0, 0.0]], dtype=D)
    for found in (factor_of_vectors(rows, scale=1.0), factor_of_matrix(rows.T @ rows, dtype=D)):
        assert len(found.eigenvalues) == 1
        assert found.eigenvalues.isnan().all()
        assert found.rotated(torch.ones(3, dtype=D)).isnan().tolist() == [True]


def test_a_diagonal_factor_is_its_sorted_positive_entries():
    found = factor_of_diagonal(torch.tensor([0.5, 0.0, 2.0, 1.0]))
    assert found.eigenvalues.tolist() == [2.0, 1.0, 0.5]
    assert found.axes is not None
    assert found.axes.tolist() == [2, 3, 0]
    assert found.rotated(torch.tensor([10.0, 11.0, 12.0, 13.0])).tolist() == [12.0, 13.0, 10.0]


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
