import itertools
import math

import pytest
import torch
from torch import Tensor

from curvature_callbacks.statistics.gradients import GradientStatistics, gradient_statistics, half_vector, kernel_drift


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(gradients: Tensor) -> GradientStatistics:
    return gradient_statistics(gradients @ gradients.T)


def cosine(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / math.hypot(*a.tolist()) / math.hypot(*b.tolist())


def two_batch_estimator(gradients: Tensor) -> tuple[float, float]:
    """McCandlish et al. (2018), eq. A.2 and A.3, with batches of one and of all: `|G|^2` and `tr Sigma`."""
    small, big = 1, len(gradients)
    norm_small = sum(float(g.norm()) ** 2 for g in gradients) / big
    norm_big = float(gradients.mean(0).norm()) ** 2
    return (big * norm_big - small * norm_small) / (big - small), (norm_small - norm_big) / (1 / small - 1 / big)


def test_both_moments_are_the_two_batch_estimators() -> None:
    for seed in range(400):
        gradients = normal(2 + seed % 31, 1 + seed % 7, seed=seed) + normal(1 + seed % 7, seed=1000 + seed)
        found = statistics_of(gradients)
        signal, noise = two_batch_estimator(gradients)
        assert found.mean_gradient_norm_squared == pytest.approx(signal, rel=1e-9, abs=1e-12)
        assert found.covariance_trace == pytest.approx(noise, rel=1e-9, abs=1e-12)


def test_covariance_trace_is_the_sample_covariances() -> None:
    gradients = normal(9, 4) + 3.0
    assert statistics_of(gradients).covariance_trace == pytest.approx(torch.cov(gradients.T).trace().item(), rel=1e-12)


def test_the_other_numbers_agree_with_loops_over_pairs() -> None:
    gradients = normal(8, 3) + 0.4
    gradients[5] = 0.0
    nonzero = [g for g in gradients if g.any()]
    cosines = [cosine(a, b) for a, b in itertools.combinations(nonzero, 2)]
    found = statistics_of(gradients)
    assert found.num_samples == 8
    assert found.mean_cosine == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)
    assert found.conflict_share == sum(value < 0 for value in cosines) / len(cosines)
    assert 0 < found.conflict_share < 1
    assert found.num_undefined_pairs == 7
    assert found.diversity == pytest.approx(sum(g.norm() ** 2 for g in gradients) / gradients.sum(0).norm() ** 2)
    assert found.norms.tolist() == pytest.approx([math.hypot(*g) for g in gradients.tolist()])


def test_norm_quantiles() -> None:
    lengths = torch.tensor([7.0, 1.0, 3.0, 2.0, 11.0], dtype=torch.float64)
    found = statistics_of(lengths[:, None] * torch.eye(5, dtype=torch.float64)).norm_quantiles()
    expected = {"norm_min": 1.0, "norm_q25": 2.0, "norm_median": 3.0, "norm_q75": 7.0, "norm_q95": 10.2, "norm_max": 11.0}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("N", [3, 7])
def test_standard_error_leaves_one_sample_out(N: int) -> None:
    gradients = normal(N, 4) + 0.5
    left_out = [two_batch_estimator(torch.cat([gradients[:i], gradients[i + 1 :]]))[0] for i in range(N)]
    mean = sum(left_out) / N
    expected = math.sqrt((N - 1) / N * sum((value - mean) ** 2 for value in left_out))
    assert statistics_of(gradients).standard_error == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("N", [2, 5, 16])
def test_moments_are_unbiased_and_the_naive_ones_are_not(N: int) -> None:
    """4 000 draws of N gradients from a normal distribution of known mean and covariance."""
    mean, scatter = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64), normal(4, 4)
    draws = mean + normal(4000, N, 4, seed=1) @ scatter.T
    found = [statistics_of(gradients) for gradients in draws]
    signal = torch.tensor([each.mean_gradient_norm_squared for each in found])
    noise = torch.tensor([each.covariance_trace for each in found])

    def errors_off(values: Tensor, truth: Tensor) -> float:
        return abs(float((values.mean() - truth) / (values.std() / math.sqrt(len(values)))))

    true_signal, true_noise = mean @ mean, (scatter @ scatter.T).trace()
    assert errors_off(signal, true_signal) < 4
    assert errors_off(noise, true_noise) < 4
    assert errors_off(draws.mean(1).square().sum(-1), true_signal) > 8
    assert errors_off((draws - draws.mean(1, keepdim=True)).square().sum((1, 2)) / N, true_noise) > 8


def test_the_standard_error_is_the_scatter_over_draws() -> None:
    draws = 1.0 + normal(3000, 16, 4)
    found = [statistics_of(gradients) for gradients in draws]
    scatter = torch.tensor([each.mean_gradient_norm_squared for each in found]).std().item()
    root_mean_square = math.sqrt(sum(each.standard_error**2 for each in found) / len(found))  # type: ignore[operator]
    assert root_mean_square == pytest.approx(scatter, rel=0.1)


def test_equal_gradients_have_no_noise() -> None:
    found = statistics_of(normal(1, 6).expand(5, 6))
    assert 0.0 <= found.covariance_trace < 1e-14
    assert found.mean_gradient_norm_squared == pytest.approx(normal(1, 6).square().sum().item())
    assert found.diversity == pytest.approx(1 / 5)
    assert found.mean_cosine == pytest.approx(1.0)
    assert (found.conflict_share, found.num_undefined_pairs) == (0.0, 0)


def test_orthogonal_gradients_have_no_signal() -> None:
    found = statistics_of(2.0 * torch.eye(4, dtype=torch.float64))
    assert (found.mean_gradient_norm_squared, found.mean_cosine, found.conflict_share, found.diversity) == (0.0, 0.0, 0.0, 1.0)
    assert found.covariance_trace == pytest.approx(4.0)


def test_gradients_that_cancel() -> None:
    found = statistics_of(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]))
    assert (found.mean_gradient_norm_squared, found.mean_cosine, found.conflict_share) == (-4.0, -1.0, 1.0)
    assert (found.diversity, found.standard_error) == (None, None)
    assert found.covariance_trace == pytest.approx(8.0)


@pytest.mark.parametrize("num_nonzero", [0, 1])
def test_without_a_pair_there_is_no_cosine(num_nonzero: int) -> None:
    gradients = torch.zeros(4, 3)
    gradients[:num_nonzero] = 1.0
    found = statistics_of(gradients)
    assert (found.mean_cosine, found.conflict_share, found.num_undefined_pairs) == (None, None, 6)
    assert all(math.isfinite(value) for value in found.norm_quantiles().values())


@pytest.mark.parametrize("scale", [1e-120, 1e-6, 1e6, 1e70])
def test_scaling_the_loss_changes_no_ratio(scale: float) -> None:
    gradients = normal(6, 3) + 0.5
    found, expected = statistics_of(scale * gradients), statistics_of(gradients)
    assert found.mean_cosine == pytest.approx(expected.mean_cosine, rel=1e-12)
    assert found.conflict_share == expected.conflict_share
    assert found.diversity == pytest.approx(expected.diversity, rel=1e-12)
    noise_scale = found.covariance_trace / found.mean_gradient_norm_squared
    assert noise_scale == pytest.approx(expected.covariance_trace / expected.mean_gradient_norm_squared, rel=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_leaves_no_range(sign: float) -> None:
    """A Gram of float32 gradients need not be positive semi-definite to the last bit."""
    product = sign * (1.0 + 1e-7)
    found = gradient_statistics(torch.tensor([[1.0, product], [product, 1.0]], dtype=torch.float64))
    assert found.mean_cosine == sign
    assert found.covariance_trace >= 0.0
    assert found.diversity == (pytest.approx(0.5) if sign > 0 else None)


def test_half_vectors_keep_the_inner_product() -> None:
    A, B = (normal(5, 5, seed=seed) for seed in (0, 1))
    A, B = A + A.T, B + B.T
    assert len(half_vector(A)) == 15
    assert (half_vector(A) @ half_vector(B)).item() == pytest.approx((A * B).sum().item())
    assert torch.equal(A, A.T)


def test_drift_is_one_less_the_cosine_of_the_kernels() -> None:
    G, G0 = normal(6, 4), normal(6, 4, seed=1)
    K, K0 = G @ G.T, G0 @ G0.T
    expected = 1.0 - float((K * K0).sum() / K.norm() / K0.norm())
    assert kernel_drift(half_vector(K), half_vector(K0)) == pytest.approx(expected, rel=1e-12)


def test_drift_of_the_same_kernel_is_zero_and_of_disjoint_ones_is_one() -> None:
    K = normal(4, 4) @ normal(4, 4).T
    assert kernel_drift(half_vector(K), half_vector(K)) == 0.0
    assert kernel_drift(half_vector(1e-9 * K), half_vector(1e9 * K)) == pytest.approx(0.0, abs=1e-15)
    first, last = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 3.0]))
    assert kernel_drift(half_vector(first), half_vector(last)) == pytest.approx(1.0)


def test_a_small_drift_is_not_lost() -> None:
    K = torch.eye(2, dtype=torch.float64)
    turned = K + 1e-10 * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert kernel_drift(half_vector(turned), half_vector(K)) == pytest.approx(0.5e-20, rel=1e-3)


@pytest.mark.parametrize("zero", [0, 1])
def test_a_zero_kernel_has_no_drift(zero: int) -> None:
    kernels = [torch.eye(3), torch.eye(3)]
    kernels[zero] = torch.zeros(3, 3)
    assert kernel_drift(*map(half_vector, kernels)) is None
