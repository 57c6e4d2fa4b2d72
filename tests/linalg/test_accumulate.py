import pytest
import torch

from curvature_callbacks.linalg.accumulate import coefficients, dot, gram, norm, subtract_combination

SIZES = (0, 1, 7, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, 100_003)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("size", SIZES)
def test_sums_over_chunks_are_sums_over_all(size: int):
    vectors = draw(3, size)
    assert torch.allclose(gram(vectors), vectors @ vectors.T)
    assert torch.allclose(dot(vectors[0], vectors[1]), vectors[0] @ vectors[1])
    assert torch.allclose(norm(vectors[2]), vectors[2].norm())
    assert torch.allclose(coefficients(vectors[:2], vectors[2]), vectors[:2] @ vectors[2])


@pytest.mark.parametrize("num_vectors", [1, 4, 5, 8, 11, 15, 16, 17, 31, 63, 64, 65, 130])
@pytest.mark.parametrize("size", [0, 700, 9000])
def test_tiles_below_the_diagonal_are_those_above(num_vectors: int, size: int):
    vectors = draw(num_vectors, size)
    K = gram(vectors)
    assert torch.allclose(K, vectors @ vectors.T, atol=1e-9)
    assert torch.equal(K, K.T) or torch.allclose(K, K.T, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_subtract_combination_is_in_place_and_complete(size: int):
    vectors, weights = draw(3, size), torch.tensor([0.5, -2.0], dtype=torch.float64)
    expected = vectors[2] - weights @ vectors[:2]
    subtract_combination(vectors[2], vectors[:2], weights)
    assert torch.allclose(vectors[2], expected)


def test_float32_sums_over_many_parameters_keep_seven_digits():
    """All terms positive: a plain float32 sum over this many loses three digits on CPU."""
    x = draw(3_000_000, dtype=torch.float32).abs() + 1.0
    exact = (x.double() ** 2).sum()
    assert dot(x, x).dtype == torch.float64
    assert abs(dot(x, x) - exact) / exact < 1e-6
    assert abs(gram(x[None])[0, 0] - exact) / exact < 1e-6
