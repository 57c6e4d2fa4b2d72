from typing import Any

import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg.gram_eigenpairs import eigenpairs_of_gram
from curvature_callbacks.linalg.lanczos.options import LanczosOptions

SHAPES = [(4, 9), (9, 4), (5, 5), (1, 6), (6, 1)]


class Factored:
    """`J' J / N` of a matrix, counting its half products."""

    is_psd = True

    def __init__(self, J: Tensor) -> None:
        self.J = J
        self.normaliser = len(J)
        self.shape = (J.shape[1], J.shape[1])
        self.dtype, self.device = J.dtype, J.device
        self.half_products = 0

    def jvp(self, v: Tensor) -> Tensor:
        self.half_products += 1
        return self.J @ v

    def vjp(self, u: Tensor) -> Tensor:
        self.half_products += 1
        return self.J.T @ u

    def matmat(self, V: Tensor) -> Tensor:
        raise NotImplementedError


def jacobian(N: int, P: int, *, seed: int = 0) -> Tensor:
    return torch.randn(N, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2


def with_singular_values(values: Tensor, P: int) -> Tensor:
    """(S, P) with these singular values and random singular vectors, float64."""
    left = torch.linalg.qr(jacobian(len(values), len(values), seed=1)).Q
    right = torch.linalg.qr(jacobian(P, len(values), seed=2)).Q
    return left @ torch.diag(values) @ right.T


def solved(J: Tensor, **options: Any) -> Any:
    double = J.double()
    return eigenpairs_of_gram(double @ double.T, Factored(J), LanczosOptions(return_eigenvectors=True, **options))


def dense(J: Tensor) -> Tensor:
    return sum((torch.outer(row, row) for row in J.double()), torch.zeros(J.shape[1], J.shape[1]).double()) / len(J)


def ends(values: Tensor, k: int, which: str) -> Tensor:
    """The wanted entries of all P descending eigenvalues."""
    k = min(k, len(values))
    bottom = {"LA": 0, "LM": 0, "SA": k, "BE": k // 2}[which]
    return torch.cat([values[: k - bottom], values[len(values) - bottom :]])


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize(("N", "P"), SHAPES)
def test_the_pairs_are_those_of_the_dense_matrix(N: int, P: int, k: int, which: str):
    """Zeros beyond the rank included: no end but the one asked for."""
    J = jacobian(N, P)
    A = dense(J)
    pairs = solved(J, k=k, which=which, tol=1e-12)
    values, V = pairs.eigenvalues, pairs.eigenvectors
    assert torch.allclose(values, ends(torch.linalg.eigvalsh(A).flip(0), k, which), atol=1e-13)
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert torch.allclose(V.T @ V, torch.eye(len(values)).double(), atol=1e-9)
    assert (A @ V - V * values).norm(dim=0).max() < 1e-12
    assert pairs.converged.all()
    assert (pairs.which, pairs.reorth_mode, pairs.is_psd) == (which, "gram", True)
    assert len(pairs.warnings) == (k > P)


def test_vectors_are_those_of_eigh_up_to_sign():
    J = jacobian(4, 9)
    pairs = solved(J, k=4)
    truth = torch.linalg.eigh(dense(J)).eigenvectors.flip(1)[:, :4]
    assert torch.allclose((pairs.eigenvectors * truth).sum(0).abs(), torch.ones(4).double())


def test_repeated_rows_add_no_direction():
    """Six rows of rank three: the rest are exact zeros with vectors of the null space."""
    J = jacobian(3, 10).repeat(2, 1)
    pairs = solved(J, k=6)
    assert (pairs.eigenvalues > 0).tolist() == [True] * 3 + [False] * 3
    assert pairs.eigenvalues[3:].tolist() == [0.0] * 3
    assert (J @ pairs.eigenvectors[:, 3:]).abs().max() < 1e-12
    assert torch.allclose(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(6).double(), atol=1e-9)


def test_equal_eigenvalues_have_orthogonal_vectors():
    pairs = solved(with_singular_values(torch.tensor([2.0, 1.0, 1.0, 1.0]).double(), 8), k=4)
    assert torch.allclose(pairs.eigenvalues, torch.tensor([1.0, 0.25, 0.25, 0.25]).double())
    assert torch.allclose(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(4).double(), atol=1e-12)


@pytest.mark.parametrize("which", ["LA", "BE"])
def test_the_zero_matrix_has_zeros_only(which: str):
    pairs = solved(torch.zeros(3, 7).double(), k=4, which=which)
    assert pairs.eigenvalues.tolist() == [0.0] * 4
    assert pairs.residuals.tolist() == [0.0] * 4
    assert pairs.converged.all()
    assert "residual_max" not in pairs.metrics()
    assert torch.allclose(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(4).double(), atol=1e-12)


SINGULAR_VALUES = torch.logspace(0, -2.5, 6, dtype=torch.float64)  # eigenvalues down to 1e-5 of the largest


def true_residuals(J: Tensor, pairs: Any) -> Tensor:
    V = pairs.eigenvectors.double()
    return (dense(J) @ V - V * pairs.eigenvalues).norm(dim=0)


def test_small_eigenvalues_keep_their_digits_in_float32():
    J = with_singular_values(SINGULAR_VALUES, 300).float()
    pairs = solved(J, k=6, tol=1e-9)  # so that the noise floor is what is asked for
    assert torch.allclose(pairs.eigenvalues, ends(torch.linalg.eigvalsh(dense(J)).flip(0), 6, "LA"), rtol=1e-6)
    assert pairs.converged.all()
    floor = 10 * torch.finfo(torch.float32).eps * pairs.eigenvalues[0]
    assert true_residuals(J, pairs).max() <= floor
    assert pairs.residuals.min() >= floor * (1 - 1e-12)  # never below it


def noisy(J: Tensor, scale: float) -> Factored:
    """Products whose `J' u` has an error along the top direction, relative to the size of u: what rounding does."""
    top = torch.linalg.svd(J).Vh[0]
    operator = Factored(J)
    operator.vjp = lambda u: J.T @ u + scale * u.norm() * top  # type: ignore[method-assign]
    return operator


def test_errors_along_the_top_are_projected_out():
    J, options = with_singular_values(SINGULAR_VALUES, 40), LanczosOptions(k=6, tol=1e-3, return_eigenvectors=True)
    pairs = eigenpairs_of_gram(J @ J.T, noisy(J, 1e-4), options)
    raw = eigenpairs_of_gram(J @ J.T, noisy(J, 1e-4), options, projections=0)
    assert true_residuals(J, raw)[-1] > 100 * true_residuals(J, pairs)[-1]
    assert pairs.num_matvecs > raw.num_matvecs


def test_a_gram_that_is_not_the_operators_does_not_converge():
    J = jacobian(4, 9)
    pairs = eigenpairs_of_gram(1.01 * J @ J.T, Factored(J), LanczosOptions(k=3, tol=1e-3))
    assert not pairs.converged.any()
    assert "3 of 3 pairs" in pairs.warnings[0]
    assert pairs.residuals[0].item() == pytest.approx(0.01 / 1.01 * pairs.eigenvalues[0].item(), rel=1e-6)


@pytest.mark.parametrize(("k", "which", "half_products"), [(3, "LA", 9), (4, "BE", 14), (2, "SA", 8)])
def test_products_are_counted(k: int, which: str, half_products: int):
    """Three halves for a pair; four for a zero, whose first look comes after a projection."""
    J = jacobian(4, 9)
    operator = Factored(J)
    pairs = eigenpairs_of_gram(J @ J.T, operator, LanczosOptions(k=k, which=which))
    assert operator.half_products == half_products
    assert pairs.num_matvecs == (half_products + 1) // 2
    assert pairs.eigenvectors is None


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_scale_of_the_loss_changes_nothing_else(scale: float):
    J = jacobian(4, 9)
    pairs, scaled = solved(J, k=6), solved(scale * J, k=6)
    assert torch.allclose(scaled.eigenvalues, scale**2 * pairs.eigenvalues, rtol=1e-12)
    assert torch.equal(scaled.converged, pairs.converged)


def test_the_same_bits_twice_and_a_seed_for_the_null_space():
    J = jacobian(4, 9)
    first, second, other = (solved(J, k=6, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert torch.equal(first.eigenvectors[:, :4], other.eigenvectors[:, :4])
    assert not torch.equal(first.eigenvectors[:, 4:], other.eigenvectors[:, 4:])


def test_a_psd_matrix_has_no_negative_curvature_to_report():
    metrics = solved(jacobian(4, 9), k=4, which="BE").metrics()
    assert set(metrics) == {
        "lambda_max",
        "lambda_min",
        "residual_lambda_max",
        "residual_lambda_min",
        "residual_max",
        "num_converged",
    }
    assert metrics["lambda_min"] == 0.0
    assert metrics["residual_max"] < 1e-12  # of the two pairs that are not zero
