"""Quadrature against dense spectra: estimates, their standard errors, and the density itself."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from curvature_callbacks import ConfigurationError, MatrixOperator, ProbeError
from curvature_callbacks.linalg.density import ESTIMATES, Density
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos.solver import lanczos
from curvature_callbacks.linalg.quadrature import QuadratureSampler, spectral_density

D = torch.float64


def bulk(P: int = 200, *, seed: int = 0) -> Tensor:
    """Eigenvalues on both sides of zero, many of them small."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(P, generator=generator, dtype=D) * torch.rand(P, generator=generator, dtype=D) ** 2 + 0.1


def with_outliers(P: int = 200) -> Tensor:
    return torch.cat([torch.tensor([50.0, 30.0, 20.0, 10.0, -8.0], dtype=D), bulk(P - 5)])


def matrix_of(eigenvalues: Tensor) -> Tensor:
    P = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(P, P, generator=torch.Generator().manual_seed(9), dtype=D)).Q
    A = Q @ torch.diag(eigenvalues) @ Q.T
    return (A + A.T) / 2


@cache
def operator_of(name: str) -> MatrixOperator:
    return MatrixOperator(matrix_of({"bulk": bulk, "outliers": with_outliers}[name]()))


def truth(eigenvalues: Tensor) -> dict[str, float]:
    """One eigenvalue at a time, in NumPy."""
    lam = [float(value) for value in eigenvalues]
    p = np.abs(lam) / np.abs(lam).sum()
    return {
        "trace": math.fsum(lam),
        "frobenius_norm": math.sqrt(math.fsum(value * value for value in lam)),
        "negative_mass": -math.fsum(value for value in lam if value < 0) / float(np.abs(lam).sum()),
        "negative_fraction": sum(value < -1e-3 * max(map(abs, lam)) for value in lam) / len(lam),
        "effective_rank": float(np.prod(p**-p)),
    }


def top(operator: MatrixOperator, k: int = 6) -> Eigenpairs:
    return lanczos(operator, k=k, which="BE", tol=1e-6, return_eigenvectors=True)


@cache
def runs(name: str, deflated: bool) -> list[Density]:
    operator = operator_of(name)
    pairs = top(operator) if deflated else None
    return [spectral_density(operator, num_probes=8, num_steps=20, seed=seed, deflate=pairs) for seed in range(30)]


def columns(found: list[Density], name: str) -> tuple[Tensor, Tensor]:
    values, errors = ([getattr(one, name + suffix) for one in found] for suffix in ("", "_standard_error"))
    return torch.tensor(values, dtype=D), torch.tensor(errors, dtype=D)


RUNS = [("bulk", False), ("outliers", False), ("outliers", True)]


@pytest.mark.parametrize(("name", "deflated"), RUNS)
def test_means_over_seeds_are_the_dense_values(name: str, deflated: bool):
    """Within 4 standard errors of the mean, plus the bias of few steps: 0.011 in shares, nothing in trace and norm."""
    expected = truth(torch.linalg.eigvalsh(operator_of(name)._matrix))
    for metric in ESTIMATES:
        values, _ = columns(runs(name, deflated), metric)
        allowed = {"negative_mass": 0.011, "negative_fraction": 0.06, "effective_rank": 0.02 * expected[metric]}.get(metric, 0)
        assert abs(values.mean() - expected[metric]) < 4 * values.std() / len(values) ** 0.5 + allowed, metric


@pytest.mark.parametrize(("name", "deflated"), RUNS)
@pytest.mark.parametrize("metric", ["trace", "frobenius_norm", "negative_mass", "effective_rank"])
def test_standard_errors_are_calibrated(metric: str, name: str, deflated: bool):
    """Over 30 seeds, 8 probes each: their size against the spread, and how often the truth lies within two (t with 7: 0.91)."""
    expected = truth(torch.linalg.eigvalsh(operator_of(name)._matrix))[metric]
    values, errors = columns(runs(name, deflated), metric)
    assert 0.6 < errors.mean() / values.std() < 1.5
    assert ((values - expected).abs() < 2 * errors + 0.005 * abs(expected)).double().mean() > 0.7


def test_deflating_outliers_halves_the_standard_errors_at_least():
    for metric, share in {"trace": 0.5, "frobenius_norm": 0.1, "negative_mass": 0.5, "effective_rank": 0.5}.items():
        (plain, plain_errors), (values, errors) = (columns(runs("outliers", deflated), metric) for deflated in (False, True))
        assert values.std() < share * plain.std(), metric
        assert errors.mean() < share * plain_errors.mean(), metric


def test_deflated_pairs_are_counted_once():
    """All pairs known: everything is exact, with nothing left to sample. A wrong weight of either part shows in between."""
    A = operator_of("outliers")
    pairs = lanczos(A, k=200, tol=1e-8, max_matvecs=300, return_eigenvectors=True)
    found = spectral_density(A, num_probes=2, deflate=pairs)
    expected = truth(torch.linalg.eigvalsh(A._matrix))
    assert (found.num_deflated, found.num_matvecs, found.num_steps) == (200, 0, 0)
    for metric in ESTIMATES:
        assert getattr(found, metric) == pytest.approx(expected[metric], rel=1e-9)
        assert getattr(found, f"{metric}_standard_error") == pytest.approx(0.0, abs=1e-9)
    assert (found.density_standard_error == 0).all()


def test_pairs_that_have_not_converged_are_not_deflated():
    pairs = top(operator_of("outliers"))
    flags = pairs.converged.clone()
    flags[2:] = False
    found = spectral_density(operator_of("outliers"), num_probes=2, deflate=replace(pairs, converged=flags))
    assert found.num_deflated == 2


def test_probes_lie_in_the_complement():
    """Half of the eigenvalues deflated: a probe that keeps its share of them would lose half of its weight."""
    operator = MatrixOperator(matrix_of(torch.linspace(1, 2, 60, dtype=D)))
    pairs = lanczos(operator, k=30, tol=1e-8, max_matvecs=60, return_eigenvectors=True)
    found = spectral_density(operator, num_probes=8, num_steps=20, deflate=pairs)
    assert found.num_deflated == 30
    assert found.trace == pytest.approx(90.0, rel=0.01)
    assert found.trace_standard_error < 0.5
    nodes = QuadratureSampler(operator, 30, 0, pairs).rule().nodes
    assert nodes.min() > 0.99  # no node at zero, where the projected operator alone has the deflated vectors


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 0.0), (D, 1e-4)])
def test_the_complement_keeps_no_deflated_value(dtype: torch.dtype, noise: float):
    """Rounding, or eigenvectors that are only good to 1e-3, would bring the outliers back as nodes within a few steps."""
    operator = MatrixOperator(operator_of("outliers")._matrix.to(dtype))
    pairs = lanczos(operator, k=6, which="BE", tol=1e-4, return_eigenvectors=True)
    bent = pairs.eigenvectors + noise * torch.randn(200, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    known = replace(pairs, eigenvectors=bent / bent.norm(dim=0))
    nodes = QuadratureSampler(operator, 60, 0, known).rule().nodes
    assert (nodes.abs() > 7).sum() == 5
    found = spectral_density(operator, num_probes=4, num_steps=60, deflate=known)
    expected = truth(torch.linalg.eigvalsh(operator_of("outliers")._matrix))
    assert found.frobenius_norm == pytest.approx(expected["frobenius_norm"], rel=0.02)
    assert abs(found.trace - expected["trace"]) < 5 * found.trace_standard_error


@pytest.mark.parametrize(("name", "deflated"), RUNS)
def test_the_density_is_the_broadened_spectrum(name: str, deflated: bool):
    found = runs(name, deflated)
    eigenvalues = torch.linalg.eigvalsh(operator_of(name)._matrix)
    spacing = found[0].grid.diff().mean().item()
    for one in found[:3]:
        assert one.density.sum().item() * (one.grid[1] - one.grid[0]).item() == pytest.approx(1.0, abs=1e-4)
        assert (one.density >= 0).all()
        assert (one.grid.diff() > 0).all()
        assert one.grid[0] < eigenvalues[0] - 3 * one.width
        assert one.grid[-1] > eigenvalues[-1] + 3 * one.width
        assert one.width == pytest.approx(2.5 * spacing, rel=0.1)
    # Cumulative shares, which quadrature is good at: the density of a spectrum of points converges only when broadened.
    one, cuts = found[0], torch.linspace(-2, 2, 9, dtype=D)
    exact = torch.distributions.Normal(eigenvalues[:, None], one.width).cdf(cuts).mean(0)
    shares = torch.stack([one.density[one.grid < cut].sum() for cut in cuts]) * (one.grid[1] - one.grid[0])
    assert (shares - exact).abs().max() < 0.1


def test_the_spread_of_the_density_is_its_standard_error():
    grid = runs("bulk", False)[0].grid
    curves = torch.from_numpy(np.stack([np.interp(grid, one.grid, one.density) for one in runs("bulk", False)]))
    middle = curves.mean(0) > 0.2 * curves.mean(0).max()
    errors = torch.stack([one.density_standard_error for one in runs("bulk", False)]).mean(0)
    assert 0.6 < (errors[middle] / curves.std(0)[middle]).median() < 1.6


@pytest.mark.parametrize("num_steps", [1, 5, 40])
@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (torch.zeros(7, 7, dtype=D), (0.0, 0.0, 0.0, 0.0, 0.0)),
        (3 * torch.eye(7, dtype=D), (21.0, 63.0**0.5, 0.0, 0.0, 7.0)),
        (-3 * torch.eye(7, dtype=D), (-21.0, 63.0**0.5, 1.0, 1.0, 7.0)),
        (torch.full((1, 1), -2.0, dtype=D), (-2.0, 2.0, 1.0, 1.0, 1.0)),
        (1e-20 * torch.eye(4, dtype=D), (4e-20, 2e-20, 0.0, 0.0, 4.0)),
    ],
    ids=["zero", "identity", "negative identity", "one parameter", "tiny"],
)
def test_one_value_is_exact_and_takes_one_step(matrix: Tensor, expected: tuple[float, ...], num_steps: int):
    found = spectral_density(MatrixOperator(matrix), num_probes=3, num_steps=num_steps)
    for metric, value in zip(ESTIMATES, expected, strict=True):
        assert getattr(found, metric) == pytest.approx(value, rel=1e-12, abs=1e-30), metric
        assert getattr(found, f"{metric}_standard_error") == pytest.approx(0.0, abs=1e-12), metric
    assert found.num_steps == 1
    assert found.density.isfinite().all()
    assert found.density.sum() * (found.grid[1] - found.grid[0]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_low_rank_ends_early(dtype: torch.dtype):
    """Three values and zero: four nodes, and the bulk at zero has no mass on either side."""
    values = torch.cat([torch.tensor([4.0, 2.0, 1.0], dtype=D), torch.zeros(97, dtype=D)])
    operator = MatrixOperator(matrix_of(values).to(dtype))
    found = spectral_density(operator, num_probes=20, num_steps=40)
    assert found.num_matvecs <= 20 * 10
    assert found.negative_mass == 0
    assert found.negative_fraction == 0
    assert abs(found.trace - 7) < 4 * found.trace_standard_error
    assert found.effective_rank == pytest.approx(truth(values[:3])["effective_rank"], rel=0.4)


def test_two_blocks_of_equal_values_are_deflated_to_the_rest():
    """Multiplicities: a random start sees each value once, with the whole weight of its eigenspace."""
    values = torch.cat([torch.full((30,), 2.0), torch.full((70,), -1.0)]).double()
    found = spectral_density(MatrixOperator(matrix_of(values)), num_probes=60, num_steps=10)
    assert found.num_steps == 2
    assert abs(found.negative_fraction - 0.7) < 4 * found.negative_fraction_standard_error
    assert abs(found.negative_mass - 70 / 130) < 4 * found.negative_mass_standard_error


def test_scaling_the_operator_scales_what_has_units():
    A = operator_of("outliers")._matrix
    one, other = (spectral_density(MatrixOperator(c * A), num_probes=3) for c in (1.0, 1e-6))
    for metric in ESTIMATES:
        factor = 1e-6 if metric in ("trace", "frobenius_norm") else 1.0
        assert getattr(other, metric) == pytest.approx(factor * getattr(one, metric), rel=1e-6)
    assert other.lambda_abs_max == pytest.approx(50e-6, rel=1e-6)


def test_the_same_seed_gives_the_same_numbers_and_no_global_one_is_drawn():
    state = torch.random.get_rng_state()
    first, second, other = (spectral_density(operator_of("bulk"), num_probes=2, num_steps=10, seed=s) for s in (3, 3, 4))
    assert first.metrics() == second.metrics()
    assert torch.equal(first.density, second.density)
    assert first.trace != other.trace
    assert torch.equal(torch.random.get_rng_state(), state)


def test_costs_are_counted():
    calls = []

    class Counting:
        shape, dtype, device, is_psd = (200, 200), D, torch.device("cpu"), False

        def matmat(self, V: Tensor) -> Tensor:
            calls.append(V.shape[1])
            return operator_of("bulk").matmat(V)

    found = spectral_density(Counting(), num_probes=3, num_steps=12)
    assert found.num_matvecs == sum(calls) == 36
    assert (found.num_probes, found.num_steps, found.num_deflated) == (3, 12, 0)
    assert found.seconds > 0


def test_positive_semi_definite_operators_have_no_negative_metrics():
    found = spectral_density(MatrixOperator(torch.diag(bulk().abs()), is_psd=True), num_probes=2, num_steps=10)
    assert set(found.metrics()) == {
        name + suffix for name in ("trace", "frobenius_norm", "effective_rank") for suffix in ("", "_standard_error")
    }
    indefinite = spectral_density(operator_of("bulk"), num_probes=2, num_steps=10).metrics()
    assert indefinite.keys() - found.metrics().keys() == {
        f"slq_negative_{name}{suffix}" for name in ("mass", "fraction") for suffix in ("", "_standard_error")
    }
    assert all(type(value) is float for value in indefinite.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 1}, "`num_probes` must be at least 2, got 1"),
        ({"num_probes": 2.0}, "`num_probes` must be an integer"),
        ({"num_steps": 0}, "`num_steps` must be an integer of at least 1, got 0"),
        ({"num_grid": 31}, "`num_grid` must be at least 32, got 31"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        spectral_density(operator_of("bulk"), **options)


def test_pairs_that_cannot_be_deflated_are_named():
    with pytest.raises(ConfigurationError, match="`deflate` must hold eigenvectors, got None"):
        spectral_density(operator_of("bulk"), deflate=lanczos(operator_of("bulk"), k=1, max_matvecs=5))
    other = lanczos(MatrixOperator(torch.eye(3, dtype=D)), k=1, return_eigenvectors=True)
    with pytest.raises(ConfigurationError, match="`deflate` must hold eigenvectors of length 200, got 3"):
        spectral_density(operator_of("bulk"), deflate=other)


def test_products_that_are_not_finite_are_no_spectrum():
    broken = torch.eye(20, dtype=D)
    broken[3, 3] = torch.nan
    with pytest.raises(ProbeError, match="not finite"):
        spectral_density(MatrixOperator(broken), num_probes=2)
