"""What ends a run: residuals, products, time, or products that are no numbers."""

import time
from typing import Any

import pytest
import torch

from curvature_callbacks.errors import ProbeError
from curvature_callbacks.linalg.lanczos.solver import lanczos
from tests.linalg.lanczos.lanczos_cases import Counted, assert_flags_are_honest, outliers_and_bulk, symmetric, true_errors

VALUES = outliers_and_bulk(150)
MODES = ("full", "partial", "selective", "off", "thick_restart")
PAIRS = {"k": 6, "which": "BE", "return_eigenvectors": True}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4])
def test_residuals_end_a_run(tol: float, mode: str):
    A = symmetric(VALUES)
    pairs = lanczos(Counted(A), **PAIRS, tol=tol, reorth_mode=mode)  # type: ignore[arg-type]
    assert pairs.converged.all()
    assert pairs.warnings == ()
    assert pairs.num_matvecs < 100
    assert (true_errors(A, pairs) <= tol * pairs.eigenvalues.abs() * 1.01).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [6, 11, 17])
def test_a_spent_budget_ends_a_run(budget: int, mode: str):
    A = symmetric(VALUES)
    pairs = lanczos(Counted(A), **PAIRS, tol=1e-10, max_matvecs=budget, reorth_mode=mode)  # type: ignore[arg-type]
    assert pairs.num_matvecs == budget
    assert not pairs.converged.all()
    missing = int((~pairs.converged).sum())
    assert any(f"{missing} of 6 pairs" in message and "`max_matvecs`" in message for message in pairs.warnings)
    assert_flags_are_honest(A, pairs)


@pytest.mark.parametrize("mode", MODES)
def test_a_spent_time_ends_a_run(mode: str):
    A = symmetric(VALUES)
    start = time.perf_counter()
    pairs = lanczos(Counted(A, seconds=0.01), **PAIRS, tol=1e-10, max_seconds=0.05, reorth_mode=mode)  # type: ignore[arg-type]
    assert 5 <= pairs.num_matvecs < 40
    assert 0.05 <= pairs.seconds <= time.perf_counter() - start
    assert not pairs.converged.all()
    assert pairs.warnings
    assert_flags_are_honest(A, pairs)


class Broken(Counted):
    """Its products are NaN or infinite from one on."""

    def __init__(self, *args: Any, first: int, value: float) -> None:
        super().__init__(*args)
        self._first, self._value = first, value

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        product = super().matmat(V)
        if self.products >= self._first:
            product[0] = self._value
        return product


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [1, 3, 9])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_products_that_are_no_numbers_end_a_run(value: float, first: int, mode: str):
    """No pairs of a map that is not fixed, and none that would be called converged: NaN compares false with everything."""
    operator = Broken(symmetric(VALUES), first=first, value=value)
    with pytest.raises(ProbeError, match="not finite"):
        lanczos(operator, k=6, tol=1e-10, reorth_mode=mode)  # type: ignore[arg-type]
    assert operator.products <= first + 5


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_time_that_is_none_is_refused(seconds: float):
    with pytest.raises(ValueError, match="`max_seconds`"):
        lanczos(Counted(torch.eye(5), limit=0), k=1, max_seconds=seconds)
