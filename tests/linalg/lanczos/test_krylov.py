"""The Lanczos relation and the orthogonality of its basis, over deflation and restarts."""

import math

import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.reorthogonalisation import Full, Off, Partial, Reorthogonalisation, Selective
from tests.linalg.lanczos.lanczos_cases import DTYPES, Counted, decaying, outliers_and_bulk, prescribed_spectra, symmetric

SIZE = 120
SPECTRA = {**prescribed_spectra(SIZE), "net": outliers_and_bulk(SIZE), "decaying": decaying(SIZE)}


def policy_of(mode: str, dtype: torch.dtype) -> Reorthogonalisation:
    eps = torch.finfo(dtype).eps
    return {
        "full": Full(),
        "partial": Partial(eps=eps, ahead=5),
        "selective": Selective(eps=eps, window=8, period=5),
        "off": Off(),
    }[mode]


def grown(A: Tensor, mode: str, steps: int, *, capacity: int = 60) -> Krylov:
    krylov = Krylov(Counted(A), capacity, seed=0, policy=policy_of(mode, A.dtype))
    while krylov.size < steps:
        for _ in range(min(5, steps - krylov.size)):
            krylov.step()
        krylov.settle()
    return krylov


def relation_error(krylov: Krylov, A: Tensor) -> float:
    """Of `A Q = Q (H + C) + beta q e'`, relative to the largest entry of H."""
    m = krylov.size
    Q = krylov.basis[:m].double().T
    removed = krylov.removed()
    H = krylov.projection.matrix()
    left = A.double() @ Q - Q @ (H if removed is None else H + removed)
    left[:, -1] -= krylov.last_beta() * krylov.basis[m].double()
    return (left.abs().max() / H.abs().max().clamp_min(1e-300)).item()


def orthogonality(krylov: Krylov) -> float:
    Q = krylov.basis[: krylov.size + 1].double()
    return (Q @ Q.T - torch.eye(len(Q), dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["full", "partial", "selective", "off"])
@pytest.mark.parametrize("name", ["net", "decaying", "cluster", "triple_top", "indefinite_with_zeros", "twelve_decades"])
def test_the_relation_holds_to_rounding(name: str, mode: str, dtype: torch.dtype):
    A = symmetric(SPECTRA[name]).to(dtype)
    for steps in (1, 2, 7, 40):
        krylov = grown(A, mode, steps)
        assert relation_error(krylov, A) <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_a_full_basis_is_orthonormal_to_rounding(name: str, dtype: torch.dtype):
    krylov = grown(symmetric(SPECTRA[name]).to(dtype), "full", 50)
    assert orthogonality(krylov) <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_a_partial_basis_is_orthonormal_to_half_the_digits(name: str, dtype: torch.dtype):
    for steps in (20, 50):
        krylov = grown(symmetric(SPECTRA[name]).to(dtype), "partial", steps)
        assert orthogonality(krylov) <= 10 * math.sqrt(torch.finfo(dtype).eps)


def refill(krylov: Krylov) -> None:
    while not krylov.finished:
        krylov.step()
        krylov.settle()


def compress(krylov: Krylov, kept: int) -> None:
    """A restart from the outermost `kept` Ritz vectors of the current segment, all earlier ones locked."""
    start, H = krylov.start, krylov.projection.matrix()
    vectors = torch.linalg.eigh(H[start:, start:]).eigenvectors
    coordinates = torch.zeros(krylov.size, start + kept, dtype=torch.float64)
    coordinates[:start, :start] = torch.eye(start, dtype=torch.float64)
    coordinates[start:, start:] = vectors[:, -kept:]
    krylov.restart(coordinates, locked=start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["net", "decaying", "cluster"])
def test_the_relation_outlives_restarts_and_new_segments(name: str, dtype: torch.dtype):
    A = symmetric(SPECTRA[name]).to(dtype)
    eps = torch.finfo(dtype).eps
    krylov = grown(A, "full", 30, capacity=30)
    for _ in range(4):
        compress(krylov, 10)
        assert krylov.projection.kept == krylov.size == 10
        krylov.step()
        assert relation_error(krylov, A) <= 100 * eps
        refill(krylov)
        assert relation_error(krylov, A) <= 100 * eps
    values, vectors = torch.linalg.eigh(krylov.projection.matrix())
    residuals = (krylov.last_beta() * vectors[-1]).abs()
    krylov.begin_segment(vectors[:, -4:], values[-4:], residuals[-4:])
    assert krylov.start == krylov.size == krylov.projection.kept == 4
    refill(krylov)
    compress(krylov, 10)
    refill(krylov)
    cut = residuals[-4:].norm().item() / values.abs().max().item()  # of the kept vectors, said to `begin_segment`
    assert relation_error(krylov, A) <= cut + 100 * eps
    assert orthogonality(krylov) <= 100 * eps


@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_couplings_to_kept_vectors_are_measured(mode: str, dtype: torch.dtype):
    """What leads back to Ritz vectors with large residuals is in H, also at a second look."""
    A = symmetric(SPECTRA["net"]).to(dtype)
    krylov = grown(A, mode, 10)
    values, vectors = torch.linalg.eigh(krylov.projection.matrix())
    residuals = (krylov.last_beta() * vectors[-1]).abs()
    assert residuals[3:6].min() > 1e-2
    krylov.begin_segment(vectors[:, 3:6], values[3:6], residuals[3:6])
    for _ in range(4):
        for _ in range(3):
            krylov.step()
        krylov.settle()
        krylov.removed()
        Q = krylov.basis[: krylov.size].double()
        rounding = torch.finfo(dtype).eps if mode == "full" else torch.finfo(dtype).eps ** 0.5
        assert (Q @ A.double() @ Q.T - krylov.projection.matrix()).abs().max() <= 20 * rounding * 90


@pytest.mark.parametrize("name", ["net", "decaying"])
def test_alpha_is_the_rayleigh_quotient(name: str):
    """Taken from the product itself: after the subtraction of beta it holds the loss of orthogonality to the one before."""
    A = symmetric(SPECTRA[name])
    krylov = Krylov(Counted(A), 40, seed=0)
    for _ in range(20):
        q = krylov.basis[krylov.size].clone()
        krylov.step()
        alpha = krylov.projection.alphas[krylov.size - 1]
        assert torch.equal(alpha, krylov.products.dot(q, (A @ q[:, None])[:, 0]))
        assert alpha.item() == pytest.approx((q @ A @ q).item(), abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_basis_has_the_operators_dtype_and_the_recurrence_is_float64(dtype: torch.dtype):
    krylov = grown(symmetric(SPECTRA["net"]).to(dtype), "full", 10)
    assert krylov.basis.dtype == dtype
    assert krylov.projection.alphas.dtype == krylov.projection.betas.dtype == krylov.projection.matrix().dtype == torch.float64


def test_what_lost_steps_took_away_is_forgotten():
    """Steps after a vanished beta are done again: added to theirs it would count twice."""
    A = symmetric(SPECTRA["indefinite_with_zeros"])
    krylov = Krylov(Counted(A), 40, seed=0, policy=Full())
    for _ in range(20):
        krylov.step()
    krylov.settle()
    assert krylov.size < 20
    assert krylov.projection.corrections[:, krylov.size :].abs().max() == 0
    assert krylov.projection.betas[krylov.size - 1] == 0
