"""Both ways to EKFAC's eigenvalues against dense rotations of each sample's gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curvature_callbacks.gram.kronecker.corrected import add_by_gradients, add_by_positions, gradients_are_smaller
from curvature_callbacks.gram.kronecker.positions import CHUNK_BYTES
from tests.gram.kronecker.factor_cases import SHARINGS, D, found_of, random_data, row_gradients


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("size", [(5, 4), (4, 6), (9, 1)])
@pytest.mark.parametrize("add", [add_by_gradients, add_by_positions])
@pytest.mark.parametrize("chunk_bytes", [1, 200, 400, CHUNK_BYTES])
def test_squares_are_those_of_the_rotated_gradients(
    chunk_bytes: int, add: Callable[..., None], size: tuple[int, int], sharing: str
):
    data = random_data((size,), passes=2)
    factors = found_of(data, sharing)
    expected = torch.ones(len(factors.G.eigenvalues), len(factors.A.eigenvalues), dtype=D)
    for g in row_gradients(data).unflatten(1, (3, 4)):
        expected += (factors.G.basis.T @ g @ factors.A.basis).square()
    (inputs, passes, _) = data[0]
    total = torch.ones_like(expected)
    for outputs in passes:
        add(total, factors, inputs, outputs, chunk_bytes)
    assert torch.allclose(total, expected)


def test_the_cheaper_rotation_is_taken():
    few, many = torch.zeros(1, 8, 64), torch.zeros(1, 1024, 64)
    assert not gradients_are_smaller(few, few, CHUNK_BYTES)
    assert gradients_are_smaller(many, many, CHUNK_BYTES)
    assert not gradients_are_smaller(many, many, 64 * 64 * 4 - 1)


def test_a_tensor_of_zeros_has_no_squares():
    data = [(a, [torch.zeros_like(b) for b in passes], counts) for a, passes, counts in random_data()]
    corrected: Tensor | None = found_of(data).corrected
    assert corrected is not None
    assert corrected.numel() == 0
