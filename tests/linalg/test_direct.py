"""What solvers for a known spectrum share: the judgement of pairs, and vectors of the null space."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg.direct import NullVectors, direct_eigenpairs
from curvature_callbacks.linalg.eigenpairs import noise_floor
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.wanted import Wanted
from curvature_callbacks.linalg.operator import MatrixOperator

D = torch.float64


@dataclass
class Diagonal:
    """The spectrum of a diagonal matrix, with these residuals."""

    values: Tensor
    residuals: Tensor
    floor: float = 1e-6
    asymmetry: float = 0.125
    num_matvecs: int = 7

    @property
    def dimension(self) -> int:
        return len(self.values)

    @property
    def scale(self) -> float:
        return self.values[0].item()

    def solve(self, ends: Wanted, tol: float) -> tuple[Tensor, Tensor, Tensor]:
        chosen = ends.choose(self.values.flip(0))
        indices = self.dimension - 1 - chosen
        return self.values[indices], torch.eye(self.dimension, dtype=D)[indices], self.residuals[indices]


SEARCH = Diagonal(torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=D), torch.tensor([3e-3, 3e-3, 3e-3, 5e-7], dtype=D))


def test_each_pair_is_judged_by_its_own_size_and_zeros_by_the_floor():
    pairs = direct_eigenpairs(SEARCH, LanczosOptions(k=4, tol=1e-3), solver="gram", start=0.0)
    assert pairs.converged.tolist() == [True, False, False, True]
    assert pairs.residuals.tolist() == [3e-3, 3e-3, 3e-3, 1e-6]
    assert "2 of 4 pairs" in pairs.warnings[0]


@pytest.mark.parametrize(
    ("which", "expected"), [("LA", [4.0, 2.0]), ("SA", [1.0, 0.0]), ("LM", [4.0, 2.0]), ("BE", [4.0, 0.0])]
)
def test_the_ends_are_those_of_all_eigenvalues(which: str, expected: list[float]):
    options = LanczosOptions(k=2, which=which, return_eigenvectors=True)  # type: ignore[arg-type]
    pairs = direct_eigenpairs(SEARCH, options, solver="gram", start=0.0)
    assert pairs.eigenvalues.tolist() == expected
    assert pairs.eigenvectors is not None
    assert pairs.eigenvectors.shape == (4, 2)


def test_more_pairs_than_dimensions_are_cut_and_said():
    pairs = direct_eigenpairs(SEARCH, LanczosOptions(k=6), solver="kronecker", start=0.0)
    assert len(pairs.eigenvalues) == 4
    assert "`k`=6" in pairs.warnings[0]
    assert (pairs.reorth_mode, pairs.num_matvecs, pairs.asymmetry) == ("kronecker", 7, 0.125)
    assert (pairs.lambda_abs_max, pairs.is_psd, pairs.eigenvectors) == (4.0, True, None)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_null_vectors_become_an_orthonormal_set(dtype: torch.dtype):
    null = NullVectors(MatrixOperator(torch.zeros(20, 20, dtype=dtype)), seed=3)
    vectors = torch.empty(0, 20, dtype=dtype)
    for _ in range(15):
        v = null.draw()
        assert v.dtype == dtype
        null.normalise(v, vectors, passes=2)
        vectors = torch.cat([vectors, v[None]])
    assert (vectors @ vectors.T - torch.eye(15, dtype=dtype)).abs().max() <= 10 * torch.finfo(dtype).eps


def test_null_vectors_have_a_seed_of_their_own():
    operator = MatrixOperator(torch.zeros(5, 5))
    state = torch.get_rng_state()
    first, again, other = (NullVectors(operator, seed).draw() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_vector_of_no_length_stays_finite():
    null = NullVectors(MatrixOperator(torch.zeros(5, 5)), seed=0)
    v = torch.zeros(5)
    null.normalise(v, torch.eye(5)[:2], passes=1)
    assert v.tolist() == [0.0] * 5


def test_the_noise_floor_is_ten_eps_of_the_largest():
    assert noise_floor(D, 3.0) == pytest.approx(30 * 2.0**-52)
    assert noise_floor(torch.float32, 0.0) == 0.0
