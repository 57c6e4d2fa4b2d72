"""Prescribed spectra through every mode whose result must be right, and what may never be called converged elsewhere."""

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from curvature_callbacks.linalg.lanczos.limits import LanczosLimits
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import iteration, lanczos, solve
from tests.linalg.lanczos.lanczos_cases import (
    DTYPES,
    ENDS,
    Counted,
    assert_flags_are_honest,
    decaying,
    gram_error,
    outliers_and_bulk,
    prescribed_spectra,
    reflected,
    symmetric,
    tolerance_of,
    true_errors,
    wanted_values,
)

SIZE = 130
MODES = ("full", "partial", "thick_restart", "auto")
MATRICES = {name: symmetric(values) for name, values in prescribed_spectra(SIZE).items()}


def asked_of(mode: str, name: str, which: str, k: int) -> dict[str, Any]:
    """A restarted basis cannot resolve twelve decades from the wrong end unless it is long (nor can ARPACK)."""
    long = mode == "thick_restart" and name == "twelve_decades" and which in ("SA", "BE")
    return {"k": k, "which": which, "reorth_mode": mode, "max_matvecs": 4 * SIZE, "basis_size": 100 if long else None}


def in_halves(*axes: Sequence[Any]) -> list[Any]:
    """Every combination. One half is slow: of three axes and more each pair of values is in the quick half too."""
    places = itertools.product(*(range(len(axis)) for axis in axes))
    combined = [([axis[i] for axis, i in zip(axes, place, strict=True)], sum(place)) for place in places]
    return [pytest.param(*values, marks=[pytest.mark.slow] if odd % 2 else []) for values, odd in combined]


ASKED = [*itertools.product(("full", "partial", "thick_restart"), ENDS), ("auto", "BE"), ("auto", "LM")]


@pytest.mark.parametrize(("name", "mode_and_end", "dtype"), in_halves(list(MATRICES), ASKED, DTYPES))
def test_prescribed_spectra(name: str, mode_and_end: tuple[str, str], dtype: torch.dtype):
    mode, which = mode_and_end
    k, A, asked = 6, MATRICES[name], tolerance_of(dtype)
    operator = Counted(A.to(dtype), limit=4 * SIZE + 4)
    pairs = lanczos(operator, **asked_of(mode, name, which, k), tol=asked["tol"], return_eigenvectors=True)
    expected = prescribed_spectra(SIZE)[name]
    scale = max(expected.abs().max().item(), 1e-300)
    assert len(pairs.eigenvalues) == k
    assert (pairs.eigenvalues - wanted_values(expected, k, which)).abs().max() <= asked["accuracy"] * scale
    assert pairs.eigenvectors is not None
    assert pairs.eigenvectors.shape == (SIZE, k)
    assert gram_error(pairs.eigenvectors) <= 10 * math.sqrt(torch.finfo(dtype).eps)
    assert_flags_are_honest(A, pairs)
    assert pairs.asymmetry <= 10 * math.sqrt(torch.finfo(dtype).eps)
    if not (mode == "thick_restart" and name == "twelve_decades"):
        assert pairs.converged.all()


@pytest.mark.parametrize(("dtype", "size", "which", "mode"), in_halves(DTYPES, [8, 11, 31], ENDS, MODES))
def test_spectra_of_small_operators(dtype: torch.dtype, size: int, which: str, mode: str):
    """The basis spans everything, or nearly: what a mode leaves to its last steps shows here."""
    asked = tolerance_of(dtype)
    for name, values in prescribed_spectra(size).items():
        A = symmetric(values)
        pairs = lanczos(Counted(A.to(dtype)), k=6, which=which, tol=asked["tol"], reorth_mode=mode, return_eigenvectors=True)
        error = (pairs.eigenvalues - wanted_values(values, 6, which)).abs().max().item()
        assert error <= asked["accuracy"] * values.abs().max().item(), name
        assert pairs.eigenvectors is not None
        assert gram_error(pairs.eigenvectors) <= 10 * math.sqrt(torch.finfo(dtype).eps), name
        assert pairs.converged.all(), name
        assert_flags_are_honest(A, pairs)


@pytest.mark.parametrize("mode", ["full", "partial", "thick_restart"])
@pytest.mark.parametrize("name", ["rank_one", "identity", "zero", "indefinite_with_zeros"])
def test_an_operator_of_few_distinct_eigenvalues_takes_few_products(name: str, mode: str):
    """Not as many as there are dimensions: a closed invariant subspace without news says that there is no more."""
    operator = Counted(MATRICES[name])
    lanczos(operator, k=6, which="BE", tol=1e-10, reorth_mode=mode, max_matvecs=4 * SIZE)
    assert operator.products <= 30


@pytest.mark.parametrize("mode", ["full", "partial", "thick_restart"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_found_at_any_tolerance_where_the_space_closes(mode: str, dtype: torch.dtype):
    """An invariant subspace shows one copy of each eigenvalue: the pairs in it have converged, and are the wrong ones."""
    values = torch.tensor([5.0] * 3 + [2.0] * 3 + [0.0] * 94)
    pairs = lanczos(Counted(symmetric(values).to(dtype)), k=3, tol=1e-1, reorth_mode=mode)
    assert pairs.converged.all()
    assert (pairs.eigenvalues >= 5 - pairs.residuals).all()
    assert (pairs.eigenvalues <= 5 + 1e-5).all()  # no Ritz value lies outside the spectrum
    assert (pairs.residuals < 1).all()


@pytest.mark.parametrize("room", [14, 17, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_restarts_where_the_device_has_no_room(room: int, dtype: torch.dtype):
    values = outliers_and_bulk(SIZE)
    A = symmetric(values)
    options = LanczosOptions(k=6, which="BE", tol=1e-4, max_matvecs=150)
    pairs = solve(Counted(A.to(dtype)), options, limits=LanczosLimits(basis_bytes=(room + 1) * SIZE * dtype.itemsize))
    assert pairs.reorth_mode == "thick_restart"
    assert pairs.num_matvecs > room
    assert pairs.converged.all()
    assert torch.allclose(pairs.eigenvalues, wanted_values(values, 6, "BE"), rtol=1e-5)
    assert solve(Counted(A.to(dtype)), options).reorth_mode == "partial"


@pytest.mark.parametrize(("free", "mode"), [(True, "partial"), (False, "full")])
def test_auto_orthogonalises_by_need_only_where_reads_are_free(free: bool, mode: str):
    """Elsewhere steps that are lost until the next look cost products: up to a third more."""
    assert lanczos(Counted(symmetric(outliers_and_bulk(SIZE)), reads_are_free=free), k=2).reorth_mode == mode


@pytest.mark.parametrize("mode", ["full", "partial", "selective", "off", "thick_restart"])
@pytest.mark.parametrize("is_psd", [False, True])
def test_the_mode_asked_for_is_the_one_that_runs(mode: str, is_psd: bool):
    """Also for operators that are known to be positive semi-definite."""
    operator = Counted(symmetric(decaying(80)))
    operator.is_psd = is_psd
    options = LanczosOptions(k=3, tol=1e-6, reorth_mode=mode)  # type: ignore[arg-type]
    policy = {"thick_restart": "Full"}.get(mode, mode.capitalize())
    assert type(iteration(operator, options).krylov.policy).__name__ == policy
    pairs = solve(operator, options)
    assert pairs.reorth_mode == mode
    assert pairs.is_psd == is_psd
    if mode in ("full", "thick_restart"):
        assert operator.num_passes() == pairs.num_matvecs
    elif mode == "off":
        assert operator.num_passes() == 0
    else:
        window = {"partial": 0, "selective": options.reorth_window}[mode]
        assert 0 < operator.num_passes(beyond=window) < pairs.num_matvecs


@pytest.mark.parametrize("mode", ["full", "partial", "thick_restart"])
def test_float64_stays_float64(mode: str):
    values = outliers_and_bulk(SIZE)
    A = symmetric(values)
    pairs = lanczos(Counted(A), k=10, which="BE", tol=1e-11, max_matvecs=400, reorth_mode=mode, return_eigenvectors=True)
    assert pairs.eigenvectors is not None
    assert pairs.eigenvectors.dtype == pairs.eigenvalues.dtype == pairs.residuals.dtype == torch.float64
    assert (pairs.eigenvalues - wanted_values(values, 10, "BE")).abs().max() <= 1e-12 * 90
    assert true_errors(A, pairs).max() <= 1e-9 * 90


@pytest.mark.parametrize("mode", ["full", "partial", "thick_restart", "selective"])
def test_it_does_not_stop_before_k_pairs_have_converged(mode: str):
    """The residuals of the first pairs say nothing about the last."""
    values = outliers_and_bulk(SIZE)
    A = symmetric(values)
    for k in (1, 4, 9, 12):
        pairs = lanczos(Counted(A), k=k, tol=1e-6, max_matvecs=120, reorth_mode=mode, return_eigenvectors=True)
        assert len(pairs.eigenvalues) == k
        assert pairs.converged.all()
        assert (true_errors(A, pairs) <= 1e-6 * pairs.eigenvalues.abs() * 1.01).all()
        assert torch.allclose(pairs.eigenvalues, wanted_values(values, k, "LA"), rtol=1e-9)


def test_the_default_mode_is_auto():
    assert inspect.signature(lanczos).parameters["reorth_mode"].default == "auto"


@pytest.mark.parametrize("mode", ["full", "thick_restart"])
def test_float32_is_as_good_as_its_inner_products(mode: str):
    """Ten largest of 2000 to 2e-6, each by its own size; and no residual below the noise floor."""
    values = decaying(2000)
    pairs = lanczos(Counted(reflected(values).float()), k=10, tol=1e-5, max_matvecs=300, reorth_mode=mode)
    assert ((pairs.eigenvalues - values[:10]).abs() <= 2e-6 * values[:10]).all()
    floor = 10 * torch.finfo(torch.float32).eps * pairs.lambda_abs_max
    assert pairs.residuals.min() >= floor > 1e-6 * pairs.lambda_abs_max
    assert pairs.converged.all()
