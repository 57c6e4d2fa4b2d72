import pytest
import torch
from torch import Tensor

from curvature_callbacks import MatrixOperator, RefusedError
from curvature_callbacks.operators.self_checks import check_symmetric


def random_matrix(size: int = 30, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


class Noisy:
    """Symmetric but for noise that differs from product to product."""

    is_psd = False
    shape, dtype, device = (30, 30), torch.float64, torch.device("cpu")

    def __init__(self, noise: float) -> None:
        self._matrix = random_matrix() + random_matrix().T
        self._noise = noise
        self._generator = torch.Generator().manual_seed(1)

    def matmat(self, V: Tensor) -> Tensor:
        product = self._matrix @ V
        draw = torch.randn(product.shape, generator=self._generator, dtype=V.dtype)
        return product + self._noise * product.norm() * draw


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_a_symmetric_matrix_passes_at_rounding_level(dtype: torch.dtype, rounding: float):
    A = random_matrix(dtype=dtype)
    assert check_symmetric(MatrixOperator(A + A.T), seed=0) <= rounding


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_an_asymmetric_matrix_is_refused(share: float):
    A = random_matrix()
    with pytest.raises(RefusedError, match="not symmetric"):
        check_symmetric(MatrixOperator(A + A.T + share * (A - A.T)), seed=0)


def test_a_noisy_operator_is_refused():
    with pytest.raises(RefusedError, match="same vector differ"):
        check_symmetric(Noisy(0.1), seed=0)


def test_noise_at_rounding_level_passes():
    assert 0 < check_symmetric(Noisy(1e-9), seed=0) < 1e-6


def test_not_a_number_is_refused():
    A = random_matrix()
    A[3, 4] = float("nan")
    with pytest.raises(RefusedError):
        check_symmetric(MatrixOperator(A), seed=0)


def test_zero_is_symmetric():
    assert check_symmetric(MatrixOperator(torch.zeros(4, 4)), seed=0) == 0.0
