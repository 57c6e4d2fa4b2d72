"""An operator is checked and solved in its own way where it brings one along, else by symmetry and by Lanczos."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from curvature_callbacks import Eigenpairs, MatrixOperator, RefusedError, lanczos
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import solve
from curvature_callbacks.operators.capabilities import SelfCheck, eigenpairs, self_check
from curvature_callbacks.operators.preconditioned import PreconditionedOperator

OPTIONS = LanczosOptions(k=2, tol=1e-8)


def symmetric(size: int = 12) -> Tensor:
    A = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return A + A.T


class Plain:
    """A user's operator: the protocol and nothing else, counting its products."""

    is_psd = False

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape, self.dtype, self.device = (len(matrix), len(matrix)), matrix.dtype, matrix.device
        self.num_products = 0

    def matmat(self, V: Tensor) -> Tensor:
        self.num_products += V.shape[1]
        return self.matrix @ V


class Checking(Plain):
    def self_check(self, seed: int) -> SelfCheck:
        if seed == 13:
            raise RefusedError("an unlucky seed")
        return SelfCheck(error=0.25, num_matvecs=seed)


class Solving(Plain):
    def eigenpairs(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        pairs = solve(MatrixOperator(self.matrix), options, initial_vectors=initial_vectors)
        return replace(pairs, product_error=0.5)


def test_an_operator_without_a_check_is_checked_for_symmetry() -> None:
    operator = Plain(symmetric())
    assert self_check(operator, 0) == (pytest.approx(0, abs=1e-13), operator.num_products)
    assert operator.num_products == 3
    with pytest.raises(RefusedError, match="not symmetric"):
        self_check(Plain(symmetric().triu()), 0)


def test_an_operator_that_checks_itself_is_asked() -> None:
    operator = Checking(symmetric().triu())
    assert self_check(operator, 7) == SelfCheck(0.25, 7)
    assert operator.num_products == 0
    with pytest.raises(RefusedError, match="unlucky"):
        self_check(operator, 13)


@pytest.mark.parametrize("inner", [Plain(symmetric()), Checking(symmetric())])
def test_between_square_roots_the_inner_operator_is_checked(inner: Plain) -> None:
    operator = PreconditionedOperator(inner, torch.arange(1.0, 13.0))
    assert self_check(operator, 3) == self_check(inner, 3)


def test_an_operator_without_pairs_of_its_own_is_solved_by_lanczos() -> None:
    operator = Plain(symmetric())
    pairs, expected = eigenpairs(operator, OPTIONS), lanczos(operator, k=2, tol=1e-8)
    assert torch.equal(pairs.eigenvalues, expected.eigenvalues)
    assert pairs.is_iterative


def test_an_operator_with_pairs_of_its_own_is_asked() -> None:
    operator = Solving(symmetric())
    first = torch.linalg.eigh(symmetric()).eigenvectors[:, -1:]
    pairs = eigenpairs(operator, OPTIONS, initial_vectors=first)
    assert pairs.product_error == 0.5
    assert operator.num_products == 0
    assert pairs.num_matvecs == lanczos(operator, k=2, tol=1e-8, initial_vectors=first).num_matvecs
