"""Thick restart: bounded memory, both ends, multiplicities, many restarts."""

import sys
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.solver import lanczos
from tests.linalg.lanczos.lanczos_cases import DTYPES, ENDS, Counted, gram_error, symmetric, wanted_values

SIZE = 300
NORMAL = torch.randn(SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Watched:
    """Krylov as `lanczos` builds it, with its restarts counted and the shape of its basis kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.restarts = 0
        self.locked = 0
        self.krylov: list[Krylov] = []
        self.basis: list[Tensor] = []
        restart = Krylov.restart

        def counted(krylov: Krylov, coordinates: Tensor, *, locked: int) -> None:
            self.restarts += 1
            self.locked = max(self.locked, locked)
            restart(krylov, coordinates, locked=locked)
            assert krylov.basis.data_ptr() == self.basis[0].data_ptr()

        def built(*args: Any, **options: Any) -> Krylov:
            self.krylov.append(Krylov(*args, **options))
            self.basis.append(self.krylov[-1].basis)
            return self.krylov[-1]

        monkeypatch.setattr(Krylov, "restart", counted)
        monkeypatch.setattr(sys.modules["curvature_callbacks.linalg.lanczos.solver"], "Krylov", built)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ENDS)
def test_many_restarts_agree_with_scipy(which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    watched = Watched(monkeypatch)
    A = symmetric(NORMAL)
    operator = Counted(A.to(dtype))
    pairs = lanczos(operator, k=6, which=which, tol=1e-4, max_matvecs=400, reorth_mode="thick_restart", basis_size=20)
    theirs = scipy.sparse.linalg.eigsh(A.numpy(), k=6, which=which, return_eigenvectors=False)
    assert pairs.converged.all()
    assert torch.allclose(pairs.eigenvalues, torch.tensor(sorted(theirs, reverse=True)), rtol=1e-5)
    assert watched.restarts >= 3
    assert len(watched.krylov) == 1
    assert watched.basis[0].shape == (21, SIZE)


@pytest.mark.parametrize("basis_size", [None, 18, 30])
def test_both_ends_come_from_one_run_of_few_products(basis_size: int | None, monkeypatch: pytest.MonkeyPatch):
    """Measured: 165, 225 and 165 products; `eigsh` with a basis of 40 takes 196."""
    watched = Watched(monkeypatch)
    operator = Counted(symmetric(NORMAL))
    pairs = lanczos(operator, k=10, which="BE", tol=1e-3, max_matvecs=400, reorth_mode="thick_restart", basis_size=basis_size)
    assert torch.allclose(pairs.eigenvalues, wanted_values(NORMAL, 10, "BE"), rtol=1e-4)
    assert pairs.converged.all()
    assert operator.products == pairs.num_matvecs
    assert operator.products <= PRODUCTS[basis_size]
    assert len(watched.basis[0]) == (basis_size or 40) + 1


PRODUCTS = {None: 200, 18: 330, 30: 220}


def test_memory_is_one_basis(monkeypatch: pytest.MonkeyPatch):
    """A restart rotates it in place, some columns at a time."""
    monkeypatch.setattr(sys.modules["curvature_callbacks.linalg.lanczos.krylov"], "_RESTART_COLUMNS", 37)
    asked = {"k": 4, "which": "BE", "tol": 1e-5, "reorth_mode": "thick_restart", "basis_size": 16, "max_matvecs": 390}
    pieces = lanczos(Counted(symmetric(NORMAL)), **asked, return_eigenvectors=True)
    monkeypatch.undo()
    whole = lanczos(Counted(symmetric(NORMAL)), **asked, return_eigenvectors=True)
    assert torch.allclose(pieces.eigenvalues, whole.eigenvalues, rtol=1e-9)
    assert pieces.eigenvectors is not None
    assert gram_error(pieces.eigenvectors) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [2, 3])
def test_multiplicities_survive_restarts(copies: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """A Krylov space shows one copy; what has converged is locked, and the complement is searched."""
    watched = Watched(monkeypatch)
    values = torch.cat([torch.full((copies,), 5.0), torch.linspace(-1, 3, 150), torch.full((copies,), -4.0)]).double()
    operator = Counted(symmetric(values).to(dtype), limit=1500)
    pairs = lanczos(
        operator,
        k=8,
        which="BE",
        tol=1e-5,
        max_matvecs=1400,
        reorth_mode="thick_restart",
        basis_size=24,
        return_eigenvectors=True,
    )
    assert pairs.converged.all()
    assert torch.allclose(pairs.eigenvalues, wanted_values(values, 8, "BE"), rtol=1e-6)
    assert pairs.eigenvectors is not None
    assert gram_error(pairs.eigenvectors) <= 100 * torch.finfo(dtype).eps
    assert watched.locked == 8
    assert watched.restarts >= 3


def test_a_breakdown_within_a_short_basis_is_deflation(monkeypatch: pytest.MonkeyPatch):
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
