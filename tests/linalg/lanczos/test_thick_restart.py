"""Thick restart: bounded memory, both ends, multiplicities, many restarts."""

from dataclasses import dataclass
from typing import Any

import pytest
import scipy.sparse.linalg
import torch

from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.limits import LanczosLimits
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.ritz import Ritz
from curvature_callbacks.linalg.lanczos.solver import iteration, lanczos, solve
from tests.linalg.lanczos.lanczos_cases import DTYPES, ENDS, Counted, gram_error, symmetric, wanted_values

SIZE = 300
NORMAL = torch.randn(SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@dataclass
class Outcome:
    """What a restarted run finds, and what is seen of it at its looks."""

    krylov: Krylov
    ritz: Ritz
    restarts: int = 0
    most_locked: int = 0


def outcome(operator: Counted, **asked: Any) -> Outcome:
    options = LanczosOptions(reorth_mode="thick_restart", **asked)
    run = iteration(operator, options)
    basis, projection = run.krylov.basis.data_ptr(), run.krylov.projection
    spokes, restarts, most_locked = projection.spokes, 0, 0
    looks = []
    for ritz in run.looks():
        looks.append(ritz)
        restarts += projection.spokes is not spokes and bool(projection.spokes.any())  # a new segment has none
        spokes, most_locked = projection.spokes, max(most_locked, projection.locked)
        assert run.krylov.basis.data_ptr() == basis
    assert looks[-1].converged(options.tol).all()
    return Outcome(run.krylov, looks[-1], restarts, most_locked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ENDS)
def test_many_restarts_agree_with_scipy(which: str, dtype: torch.dtype):
    A = symmetric(NORMAL)
    ours = outcome(Counted(A.to(dtype)), k=6, which=which, tol=1e-4, max_matvecs=400, basis_size=20)
    theirs = scipy.sparse.linalg.eigsh(A.numpy(), k=6, which=which, return_eigenvectors=False)
    assert torch.allclose(ours.ritz.values, torch.tensor(sorted(theirs, reverse=True)), rtol=1e-5)
    assert ours.restarts >= 3
    assert ours.krylov.basis.shape == (21, SIZE)


@pytest.mark.parametrize("basis_size", [None, 18, 30])
def test_both_ends_come_from_one_run_of_few_products(basis_size: int | None):
    """Measured: 165, 225 and 165 products; `eigsh` with a basis of 40 takes 196."""
    operator = Counted(symmetric(NORMAL))
    ours = outcome(operator, k=10, which="BE", tol=1e-3, max_matvecs=400, basis_size=basis_size)
    assert torch.allclose(ours.ritz.values, wanted_values(NORMAL, 10, "BE"), rtol=1e-4)
    assert operator.products == ours.krylov.num_matvecs
    assert operator.products <= PRODUCTS[basis_size]
    assert len(ours.krylov.basis) == (basis_size or 40) + 1


PRODUCTS = {None: 200, 18: 330, 30: 220}


def test_memory_is_one_basis():
    """A restart rotates it in place, some columns at a time."""
    options = LanczosOptions(
        k=4, which="BE", tol=1e-5, reorth_mode="thick_restart", basis_size=16, max_matvecs=390, return_eigenvectors=True
    )
    in_pieces = solve(Counted(symmetric(NORMAL)), options, limits=LanczosLimits(restart_columns=37))
    at_once = solve(Counted(symmetric(NORMAL)), options)
    assert torch.allclose(in_pieces.eigenvalues, at_once.eigenvalues, rtol=1e-9)
    assert in_pieces.eigenvectors is not None
    assert gram_error(in_pieces.eigenvectors) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [2, 3])
def test_multiplicities_survive_restarts(copies: int, dtype: torch.dtype):
    """A Krylov space shows one copy; what has converged is locked, and the complement is searched."""
    values = torch.cat([torch.full((copies,), 5.0), torch.linspace(-1, 3, 150), torch.full((copies,), -4.0)]).double()
    operator = Counted(symmetric(values).to(dtype), limit=1500)
    ours = outcome(operator, k=8, which="BE", tol=1e-5, max_matvecs=1400, basis_size=24)
    assert torch.allclose(ours.ritz.values, wanted_values(values, 8, "BE"), rtol=1e-6)
    assert gram_error(ours.krylov.vectors(ours.ritz.coordinates)) <= 100 * torch.finfo(dtype).eps
    assert ours.most_locked == 8
    assert ours.restarts >= 3


def test_a_breakdown_within_a_short_basis_is_deflation():
    values = torch.tensor([5.0] * 6 + [2.0] * 6 + [-1.0] * 6 + [0.0] * 82, dtype=torch.float64)
    operator = Counted(symmetric(values))
    pairs = lanczos(operator, k=9, which="LA", tol=1e-8, max_matvecs=300, reorth_mode="thick_restart", basis_size=17)
    assert torch.allclose(pairs.eigenvalues, values.sort(descending=True).values[:9], atol=1e-12)
    assert pairs.converged.all()
    assert operator.products <= 60


@pytest.mark.parametrize("size", [8, 13, 25, 41, 150])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_k_pairs_of_any_dimension(size: int, k: int):
    values = NORMAL[:size]
    asked = {"k": k, "which": "BE", "tol": 1e-6, "reorth_mode": "thick_restart", "basis_size": k + 8, "max_matvecs": 1000}
    pairs = lanczos(Counted(symmetric(values), limit=1010), **asked)
    assert pairs.converged.all()
    assert torch.allclose(pairs.eigenvalues, wanted_values(values, k, "BE"), atol=1e-8)


@pytest.mark.parametrize(
    ("name", "options"),
    [("basis_size", {"basis_size": 15}), ("basis_size", {"basis_size": 40, "reorth_mode": "full"})],
)
def test_a_basis_too_short_or_of_another_mode_is_refused(name: str, options: dict[str, Any]):
    operator = Counted(torch.eye(5), limit=0)
    with pytest.raises(ValueError, match=f"`{name}`"):
        lanczos(operator, **{"k": 8, "reorth_mode": "thick_restart", **options})
