"""Starting from the eigenvectors of a nearby operator: fewer products, and no end missed."""

import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg.lanczos.limits import DEFAULT_LIMITS
from curvature_callbacks.linalg.lanczos.solver import lanczos
from tests.linalg.lanczos.lanczos_cases import Counted, outliers_and_bulk, symmetric, wanted_values

SIZE = 200
SEEDS = range(3)
SIZES = (0.0, 0.01, 0.1, 1.0, 5.0)  # spectral norm of the change; the smallest eigenvalue is -3, the largest 90


def change(norm: float, seed: int) -> Tensor:
    noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise + noise.T
    return noise * (norm / torch.linalg.matrix_norm(noise, 2))


def earlier_matrix(seed: int) -> Tensor:
    return symmetric(outliers_and_bulk(SIZE, seed=seed), seed=seed)


@pytest.mark.parametrize("tol", [1e-2, 1e-3])
@pytest.mark.parametrize("norm", SIZES)
def test_the_largest_pair_takes_at_most_half_the_products(norm: float, tol: float):
    for seed in SEEDS:
        A = earlier_matrix(seed)
        vector = torch.linalg.eigh(A).eigenvectors[:, -1:]
        B = A + change(norm, seed)
        cold = lanczos(Counted(B), k=1, tol=tol, seed=seed)
        warm = lanczos(Counted(B), k=1, tol=tol, seed=seed, initial_vectors=vector)
        assert warm.converged.all()
        assert torch.allclose(warm.eigenvalues, torch.linalg.eigvalsh(B)[-1:], rtol=3 * tol**2)
        assert 2 * warm.num_matvecs <= cold.num_matvecs


@pytest.mark.parametrize("mode", ["full", "thick_restart"])
@pytest.mark.parametrize("k", [6, 10])
@pytest.mark.parametrize("norm", SIZES)
def test_pairs_at_both_ends_are_all_found_and_cost_no_more(norm: float, k: int, mode: str):
    """While the operator moves little. After a great change it is a random start with another seed: some looks more or less."""
    look_every = DEFAULT_LIMITS.look_every
    products = {"cold": 0, "warm": 0}
    for seed in SEEDS:
        A = earlier_matrix(seed)
        options = {"k": k, "which": "BE", "tol": 1e-2, "max_matvecs": 300, "reorth_mode": mode, "seed": seed}
        old = lanczos(Counted(A), **options, return_eigenvectors=True)
        B = A + change(norm, seed)
        cold = lanczos(Counted(B), **options)
        warm = lanczos(Counted(B), **options, initial_vectors=old.starting_vector()[:, None])
        expected = torch.linalg.eigvalsh(B)[[-1, -2, 1, 0]]
        assert warm.converged.all()
        assert torch.allclose(warm.eigenvalues[[0, 1, -2, -1]], expected, rtol=1e-2)
        products["cold"] += cold.num_matvecs
        products["warm"] += warm.num_matvecs
        assert warm.num_matvecs <= cold.num_matvecs + look_every * (1 if norm <= 0.1 else 4)
    assert products["warm"] <= products["cold"] * (1.0 if norm <= 0.1 else 1.15)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_an_end_that_the_vectors_lack_is_found(noise: float):
    """Else all residuals are small and the smallest eigenvalue is reported as some positive one."""
    for seed in range(8):
        A = earlier_matrix(seed) + change(noise, seed)
        values, vectors = torch.linalg.eigh(A)
        for lacking in (vectors[:, -3:], vectors[:, -1:], vectors[:, :1]):
            pairs = lanczos(Counted(A), k=6, which="BE", tol=1e-2, seed=seed, initial_vectors=lacking)
            assert torch.allclose(pairs.eigenvalues, wanted_values(values, 6, "BE"), rtol=1e-2)


def test_the_start_has_the_operators_dtype_and_any_length():
    A = earlier_matrix(0)
    vectors = torch.linalg.eigh(A).eigenvectors[:, -2:]
    plain = lanczos(Counted(A.float()), k=2, initial_vectors=vectors)
    scaled = lanczos(Counted(A.float()), k=2, initial_vectors=vectors * 1e4)
    assert plain.num_matvecs == scaled.num_matvecs
    assert torch.allclose(plain.eigenvalues, scaled.eigenvalues, rtol=1e-6)
    assert torch.allclose(plain.residuals, scaled.residuals, rtol=1e-2)


def test_lengths_are_weights():
    """A vector that weighs nothing is as if it were absent; pairs of small size weigh most in the starting vector."""
    A = earlier_matrix(0)
    vectors = torch.linalg.eigh(A).eigenvectors[:, -2:]
    alone = lanczos(Counted(A), k=1, initial_vectors=vectors[:, 1:])
    beside = lanczos(Counted(A), k=1, initial_vectors=vectors * torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(alone.residuals, beside.residuals)
    pairs = lanczos(Counted(A), k=6, which="BE", tol=1e-8, max_matvecs=300, return_eigenvectors=True)
    shares = pairs.eigenvectors.T @ pairs.starting_vector()
    assert torch.allclose(shares * pairs.eigenvalues.abs() / pairs.eigenvalues.abs().min(), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(SIZE,), (SIZE + 1, 2), (SIZE, 0), (2, SIZE)])
def test_initial_vectors_of_another_shape_are_refused(shape: tuple[int, ...]):
    operator = Counted(torch.eye(SIZE), limit=0)
    with pytest.raises(ValueError, match="`initial_vectors`"):
        lanczos(operator, k=1, initial_vectors=torch.ones(shape))
