"""Without a basis that stays orthonormal converged pairs come back as ghosts: none may be called converged."""

import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.reorthogonalisation import Off, Selective
from curvature_callbacks.linalg.lanczos.solver import lanczos
from tests.linalg.lanczos.lanczos_cases import (
    DTYPES,
    Counted,
    assert_distinct_eigenvalues,
    assert_flags_are_honest,
    outliers_and_bulk,
    symmetric,
    true_errors,
    wanted_values,
)

SIZE = 200


def steep(size: int, seed: int) -> Tensor:
    del seed
    return 100 * 0.7 ** torch.arange(size, dtype=torch.float64)


def well_separated(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    top = torch.linspace(5, 20, 12, dtype=torch.float64)
    return torch.cat([top, torch.rand(size - 12, generator=generator, dtype=torch.float64)])


def net(size: int, seed: int) -> Tensor:
    return outliers_and_bulk(size, seed=seed)


SPECTRA = {"steep": steep, "well_separated": well_separated, "net": net}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["selective", "off"])
@pytest.mark.parametrize("steps", [100, pytest.param(190, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPECTRA)
def test_no_ghost_is_called_converged(name: str, steps: int, mode: str, dtype: torch.dtype):
    for seed in (0, 1) if mode == "off" and name == "net" else (0,):
        values = SPECTRA[name](SIZE, seed)
        A = symmetric(values, seed=seed)
        for which, tol in (("LA", 1e-14), ("LA", 1e-3), ("BE", 1e-3)):
            pairs = lanczos(
                Counted(A.to(dtype)),
                k=10,
                which=which,
                tol=tol,
                max_matvecs=steps,
                reorth_mode=mode,
                seed=seed,
                return_eigenvectors=True,
            )
            tolerance = max(3 * tol**2, 100 * torch.finfo(dtype).eps) * values.abs().max().item()
            assert_distinct_eigenvalues(values, pairs, tolerance=tolerance)
            assert_flags_are_honest(A, pairs)


@pytest.mark.parametrize("mode", ["selective", "off"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_are_ghosts_to_be_dropped(mode: str, dtype: torch.dtype):
    """Else the tests here would test nothing: as they stand the Ritz values hold copies that look converged."""
    values = steep(SIZE, 0)
    policy = Off() if mode == "off" else Selective(eps=1.0, window=2, period=1000)
    krylov = Krylov(Counted(symmetric(values).to(dtype)), 100, seed=0, policy=policy)
    for _ in range(60):
        krylov.step()
    ritz, vectors = torch.linalg.eigh(krylov.projection.matrix())
    looks_converged = krylov.last_beta() * vectors[-1].abs() <= 1e-3 * ritz
    assert int((looks_converged & (ritz > 0.99 * values[0])).sum()) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["LA", "BE"])
def test_selective_finds_all_wanted_pairs(which: str, dtype: torch.dtype):
    """Its passes against a basis that is no longer orthogonal would blow the recurrence up."""
    for seed in range(3):
        values = outliers_and_bulk(SIZE, seed=seed)
        A = symmetric(values, seed=seed)
        operator = Counted(A.to(dtype))
        pairs = lanczos(operator, k=8, which=which, tol=1e-3, reorth_mode="selective", seed=seed, return_eigenvectors=True)
        assert pairs.converged.all()
        assert torch.allclose(pairs.eigenvalues, wanted_values(values, 8, which), rtol=1e-3)
        assert operator.products <= 60
        assert_flags_are_honest(A, pairs)


@pytest.mark.parametrize("mode", ["selective", "off"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_ritz_value_lies_outside_the_spectrum(mode: str, dtype: torch.dtype):
    """A negative `lambda_min` is reported as proof of negative curvature, converged or not."""
    for seed in range(2):
        values = steep(SIZE, seed)
        pairs = lanczos(
            Counted(symmetric(values, seed=seed).to(dtype)), k=6, which="BE", tol=1e-14, reorth_mode=mode, seed=seed
        )
        slack = 1e3 * torch.finfo(dtype).eps * 100
        assert pairs.eigenvalues.max() <= values.max() + slack
        assert pairs.eigenvalues.min() >= values.min() - slack


def test_each_end_has_its_own_pairs():
    """Copies at one end once took the places of the other: the smallest wanted was the sixth largest."""
    values = outliers_and_bulk(SIZE)
    for steps in (190, 195, 200):
        pairs = lanczos(Counted(symmetric(values)), k=10, which="BE", tol=1e-6, max_matvecs=steps, reorth_mode="off")
        assert (pairs.eigenvalues[:5] > 1.5).all()
        assert (pairs.eigenvalues[5:] < 0.5).all()


def test_residuals_of_short_ritz_vectors_are_true():
    """Where `Q s` all but cancels, the rounding of the relation is no longer small beside it."""
    values = outliers_and_bulk(SIZE)
    A = symmetric(values)
    for steps in (100, 150, 200):
        pairs = lanczos(Counted(A), k=10, tol=1e-14, max_matvecs=steps, reorth_mode="off", return_eigenvectors=True)
        assert (true_errors(A, pairs) <= 2 * pairs.residuals).all()
