import itertools
import math

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from curvature_callbacks import MatrixOperator, lanczos
from tests.linalg.lanczos.lanczos_cases import DTYPES, ENDS, Counted, symmetric, wanted_values

P = 40

SPECTRA = {
    "random": torch.randn(P, generator=torch.Generator().manual_seed(1)),
    "rank_one": torch.tensor([3.0] + [0.0] * (P - 1)),
    "identity": torch.ones(P),
    "zero": torch.zeros(P),
    "many_zeros": torch.tensor([5.0, 4.0, 2.5, 1.5, -0.5, -1.0, -3.0] + [0.0] * (P - 7)),
    "twelve_decades": torch.logspace(0, -12, P, dtype=torch.float64),
    "negative": -torch.arange(1.0, P + 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("name", SPECTRA)
def test_a_full_basis_gives_the_dense_eigenvalues(name: str, which: str, dtype: torch.dtype):
    A = symmetric(SPECTRA[name])
    pairs = lanczos(Counted(A.to(dtype)), k=5, which=which, tol=1e-14)
    scale = max(A.abs().max().item(), 1e-30)
    assert len(pairs.eigenvalues) == 5
    assert (pairs.eigenvalues - wanted_values(torch.linalg.eigvalsh(A), 5, which)).abs().max() <= 100 * torch.finfo(
        dtype
    ).eps * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ENDS)
def test_agrees_with_scipy_eigsh(which: str, dtype: torch.dtype):
    A = symmetric(torch.randn(150, generator=torch.Generator().manual_seed(3)) ** 3)
    theirs = scipy.sparse.linalg.eigsh(A.numpy(), k=7, which=which, return_eigenvectors=False)
    pairs = lanczos(Counted(A.to(dtype)), k=7, which=which, tol=1e-6, max_matvecs=120)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    assert pairs.converged.all()
    assert torch.allclose(
        pairs.eigenvalues, torch.tensor(sorted(theirs, reverse=True)), rtol=0, atol=tolerance * abs(theirs).max()
    )


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 3, P - 1, P])
def test_as_many_pairs_as_asked_for(name: str, k: int):
    A = symmetric(SPECTRA[name])
    pairs = lanczos(Counted(A), k=k)
    assert pairs.eigenvalues.shape == pairs.residuals.shape == pairs.converged.shape == (k,)
    assert pairs.eigenvalues.dtype == torch.float64
    assert (pairs.eigenvalues.diff() <= 0).all()


def test_more_pairs_than_dimensions_are_cut_and_said():
    pairs = lanczos(Counted(symmetric(SPECTRA["random"])), k=P + 3)
    assert len(pairs.eigenvalues) == P
    assert any(f"`k`={P + 3}" in message for message in pairs.warnings)


@pytest.mark.parametrize("value", [0.0, 2.5, -1e-8])
def test_one_dimension(value: float):
    pairs = lanczos(Counted(torch.tensor([[value]], dtype=torch.float64)), k=1)
    assert pairs.eigenvalues.item() == pytest.approx(value)
    assert pairs.converged.all()


def test_a_rank_one_operator_has_one_eigenvalue_and_no_ghost():
    pairs = lanczos(Counted(symmetric(SPECTRA["rank_one"])), k=6)
    assert (pairs.eigenvalues.abs() > 1e-10).sum() == 1


@pytest.mark.parametrize("k", [5, P])
def test_multiplicities_are_found_by_deflation(k: int):
    """A Krylov space sees one copy of an eigenvalue; restarts in the complement must find the others."""
    clusters = torch.tensor([2.0] * 3 + [1.0] * 2 + [0.1] * (P - 5), dtype=torch.float64)
    pairs = lanczos(Counted(symmetric(clusters)), k=k, tol=1e-14)
    assert torch.allclose(pairs.eigenvalues, clusters[:k])


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eigenvectors_are_orthonormal_and_satisfy_the_relation(name: str, dtype: torch.dtype):
    A = symmetric(SPECTRA[name]).to(dtype)
    pairs = lanczos(Counted(A), k=6, which="BE", tol=1e-14, return_eigenvectors=True)
    V = pairs.eigenvectors.double()
    eps = torch.finfo(dtype).eps
    assert pairs.eigenvectors.dtype == dtype
    assert (V.T @ V - torch.eye(6)).abs().max() <= 10 * math.sqrt(eps)
    assert (V.norm(dim=0) - 1).abs().max() <= 4 * eps  # exactly unit, though the basis has half the digits
    assert (A.double() @ V - V * pairs.eigenvalues).norm(dim=0).max() <= 100 * eps * max(A.abs().max().item(), eps) * P


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [8, 14, 20])
def test_residual_estimates_are_the_true_residuals(steps: int, dtype: torch.dtype):
    A = symmetric(SPECTRA["random"]).to(dtype)
    options = {"k": 5, "which": "BE", "max_matvecs": steps, "tol": 1e-14, "return_eigenvectors": True}
    estimated = lanczos(Counted(A), **options)
    true = lanczos(Counted(A), **options, true_residuals=True)
    V = estimated.eigenvectors.double()
    expected = (A.double() @ V - V * estimated.eigenvalues).norm(dim=0)
    slack = 1e3 * torch.finfo(dtype).eps
    assert torch.allclose(estimated.residuals, expected, rtol=1e-3, atol=slack)
    assert torch.allclose(true.residuals, expected, rtol=1e-4, atol=slack)
    assert true.num_matvecs == estimated.num_matvecs + 5


@pytest.mark.parametrize("name", ["random", "many_zeros", "twelve_decades"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_residual_bounds_its_error(name: str, dtype: torch.dtype):
    """Some eigenvalue lies within the residual of each Ritz value, whether it has converged or not."""
    A = symmetric(SPECTRA[name])
    dense = torch.linalg.eigvalsh(A)
    for steps in (6, 12, 25):
        pairs = lanczos(Counted(A.to(dtype)), k=6, which="BE", max_matvecs=steps)
        distance = (pairs.eigenvalues[:, None] - dense).abs().min(1).values
        assert (distance <= 1.01 * pairs.residuals).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_converged_judges_each_pair_by_its_own_size(tol: float, dtype: torch.dtype):
    """A tolerance relative to the largest would pass the small negative end long before it is known."""
    A = symmetric(torch.cat([torch.linspace(1, 100, 20), torch.linspace(-0.5, 0.5, 40)]))
    pairs = lanczos(Counted(A.to(dtype)), k=8, which="BE", tol=tol, max_matvecs=40)
    floor = 10 * torch.finfo(dtype).eps * pairs.lambda_abs_max
    assert torch.equal(pairs.converged, pairs.residuals <= (tol * pairs.eigenvalues.abs()).clamp_min(floor))
    assert (pairs.residuals >= floor).all()
    assert 0 < pairs.converged.sum() < (pairs.residuals <= tol * pairs.lambda_abs_max).sum()


def test_pairs_out_of_budget_are_returned_flagged_and_said():
    pairs = lanczos(Counted(symmetric(SPECTRA["random"])), k=6, tol=1e-10, max_matvecs=7)
    assert not pairs.converged.all()
    assert any("max_matvecs" in message for message in pairs.warnings)
    assert pairs.num_matvecs == 7


def test_negative_curvature_agrees_with_the_whole_spectrum():
    A = symmetric(SPECTRA["many_zeros"])
    metrics = lanczos(Counted(A), k=P, which="BE", tol=1e-8).metrics()
    dense = torch.linalg.eigvalsh(A)
    negative = dense[dense < -1e-8 * dense.abs().max()]
    assert metrics["ritz_negative_fraction"] == pytest.approx(len(negative) / P)
    assert metrics["ritz_negative_mass"] == pytest.approx((negative.abs().sum() / dense.abs().sum()).item())
    assert metrics["most_negative_eigenvalue"] == pytest.approx(-3.0)
    assert (metrics["lambda_max"], metrics["lambda_min"]) == (pytest.approx(5.0), pytest.approx(-3.0))


def test_rounding_below_the_threshold_is_not_negative_curvature():
    almost_psd = symmetric(torch.tensor([1.0, 0.5, 0.0, 0.0, -1e-7]))
    metrics = lanczos(Counted(almost_psd), k=5, which="BE", tol=1e-3).metrics()
    assert metrics["ritz_negative_fraction"] == metrics["ritz_negative_mass"] == 0.0


NEGATIVE = {"ritz_negative_fraction", "ritz_negative_mass", "most_negative_eigenvalue"}


def test_negative_curvature_is_absent_until_the_lowest_pair_has_converged():
    pairs = lanczos(Counted(symmetric(SPECTRA["random"])), k=6, which="BE", tol=1e-12, max_matvecs=6)
    assert not pairs.converged[-1]
    assert not NEGATIVE & set(pairs.metrics())
    assert math.isfinite(pairs.metrics()["lambda_min"])


@pytest.mark.parametrize(
    ("which", "said"),
    [("LA", set()), ("LM", {"most_negative_eigenvalue"}), ("SA", {"most_negative_eigenvalue"}), ("BE", NEGATIVE)],
)
def test_negative_curvature_is_said_only_of_an_end_that_was_looked_at(which: str, said: set[str]):
    metrics = lanczos(Counted(symmetric(SPECTRA["many_zeros"])), k=4, which=which).metrics()
    assert NEGATIVE & set(metrics) == said


def test_residual_max_is_relative_and_num_converged_counts():
    pairs = lanczos(Counted(symmetric(SPECTRA["random"])), k=6, which="BE", max_matvecs=20)
    relative = max(r / abs(t) for r, t in zip(pairs.residuals.tolist(), pairs.eigenvalues.tolist(), strict=True))
    assert pairs.metrics()["residual_max"] == pytest.approx(relative)
    assert pairs.metrics()["num_converged"] == sum(pairs.converged.tolist())


def test_psd_operators_report_no_negative_curvature():
    A = symmetric(SPECTRA["twelve_decades"])
    assert not any("negative" in name for name in lanczos(MatrixOperator(A, is_psd=True), k=3).metrics())


def test_same_seed_same_bits_and_another_start_otherwise():
    A = symmetric(SPECTRA["random"])
    runs = [lanczos(Counted(A), k=4, max_matvecs=9, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(runs[0].eigenvalues, runs[1].eigenvalues)
    assert torch.equal(runs[0].residuals, runs[1].residuals)
    assert not torch.equal(runs[0].residuals, runs[2].residuals)


@pytest.mark.parametrize("name", ["random", "rank_one"])
def test_the_global_generator_is_not_touched(name: str):
    state = torch.get_rng_state()
    lanczos(Counted(symmetric(SPECTRA[name])), k=4)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("true_residuals", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_products_are_counted(name: str, true_residuals: bool):
    operator = Counted(symmetric(SPECTRA[name]))
    pairs = lanczos(operator, k=4, max_matvecs=20, true_residuals=true_residuals)
    assert pairs.num_matvecs == operator.products
    assert operator.products <= 20 + 4 + (4 if true_residuals else 0)  # at most four are lost to the first deflation


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["k"], [0, -1, True, 2.5, "3"]),
        *itertools.product(["tol"], [0.0, -1e-3, math.nan]),
        ("which", "XX"),
        ("max_matvecs", 2),
    ],
)
def test_bad_options_are_named_before_the_first_product(name: str, value: object):
    operator = Counted(torch.eye(5), limit=0)
    with pytest.raises(ValueError, match=f"`{name}`"):
        lanczos(operator, **{"k": 3, name: value})


def test_asymmetry_is_measured():
    A = symmetric(SPECTRA["random"])
    skew = torch.triu(A, 1)
    assert lanczos(Counted(A), k=3).asymmetry < 1e-12
    assert lanczos(Counted(A + 0.3 * (skew - skew.T)), k=3, max_matvecs=30).asymmetry > 1e-2


@pytest.mark.parametrize("matrix", [torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 2, dtype=torch.float16)])
def test_matrix_operator_wants_a_square_float_matrix(matrix: Tensor):
    with pytest.raises(ValueError, match="`matrix`"):
        MatrixOperator(matrix)


@pytest.mark.parametrize(
    ("k", "which", "ends"),
    [(1, "BE", {"lambda_max"}), (2, "SA", {"lambda_min"}), (2, "LA", {"lambda_max"}), (2, "BE", {"lambda_max", "lambda_min"})],
)
def test_an_end_is_named_only_when_it_was_asked_for(k: int, which: str, ends: set[str]):
    A = torch.diag(torch.arange(-5.0, 8.0, dtype=torch.float64))
    metrics = lanczos(MatrixOperator(A), k=k, which=which).metrics()
    assert {"lambda_max", "lambda_min"} & set(metrics) == ends
    assert all(metrics[end] == pytest.approx({"lambda_max": 7.0, "lambda_min": -5.0}[end]) for end in ends)
