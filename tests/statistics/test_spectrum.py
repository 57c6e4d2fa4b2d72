import math
import warnings

import pytest
import torch
from torch import Tensor

from curvature_callbacks import Spectrum
from curvature_callbacks.errors import LinAlgError
from curvature_callbacks.statistics import spectrum as module
from curvature_callbacks.statistics.spectrum import centred, spectrum_of_gram, union
from tests.reference import dense_fisher, fisher_eigenvalues, spectrum_metrics

SHAPES = [(6, 20), (20, 6), (2, 1), (2, 9), (5, 5), (9, 1)]


def gradients(N: int, P: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(N, P, generator=generator, dtype=torch.float64) + 0.3
    if rank is not None:
        G = G[:, :rank] @ torch.randn(rank, P, generator=generator, dtype=torch.float64)
    return G


def spectrum_of(G: Tensor, *, dtype: torch.dtype = torch.float64) -> Spectrum:
    return spectrum_of_gram(G @ G.T, num_params=G.shape[1], dtype=dtype)


@pytest.mark.parametrize(("N", "P"), SHAPES)
def test_eigenvalues_are_those_of_the_dense_fisher(N: int, P: int):
    G = gradients(N, P)
    dense = torch.linalg.eigvalsh(dense_fisher(G)).flip(0)[: min(N, P)]
    found = spectrum_of(G)
    assert found.rank == min(N, P)
    assert torch.allclose(found.eigenvalues, dense)
    assert found.trace == pytest.approx(torch.trace(dense_fisher(G)).item())


@pytest.mark.parametrize(("N", "P"), SHAPES)
def test_metrics_agree_with_independent_formulas(N: int, P: int):
    G = gradients(N, P)
    found = spectrum_of(G)
    expected = spectrum_metrics(fisher_eigenvalues(G), P, G, damping=0.07)
    assert found.metrics(damping=0.07) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_rank_is_the_number_of_directions(rank: int):
    found = spectrum_of(gradients(12, 30, rank=rank))
    assert found.rank == rank
    assert found.metrics()["effective_rank"] <= rank + 1e-9


def test_equal_eigenvalues_give_whole_numbers():
    metrics = spectrum_of(torch.eye(4, 10, dtype=torch.float64)).metrics()
    for name in ("effective_rank", "stable_rank", "participation_ratio", "rank"):
        assert metrics[name] == pytest.approx(4)
    assert metrics["condition_number"] == pytest.approx(1)
    assert metrics["spectral_gap"] == pytest.approx(0)
    assert metrics["top_share"] == pytest.approx(0.25)
    assert math.isinf(metrics["participation_ratio_unbiased"])  # orthogonal gradients: no pair overlaps


def test_identical_gradients_have_rank_one():
    G = gradients(1, 8).expand(5, 8)
    metrics = spectrum_of(G).metrics()
    assert metrics["rank"] == metrics["condition_number"] == 1
    assert metrics["participation_ratio_unbiased"] == pytest.approx(1)
    assert metrics["spectral_gap"] == metrics["lambda_max"]
    assert metrics["mean_gradient_norm_squared"] == pytest.approx((G[0] @ G[0]).item())


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_scaling_the_loss_changes_no_rank_and_no_ratio(scale: float):
    G = gradients(8, 30, rank=5)
    here, there = spectrum_of(G), spectrum_of(G * scale)
    assert there.rank == here.rank
    assert there.eigenvalues / scale**2 == pytest.approx(here.eigenvalues, rel=1e-9)
    for name in ("condition_number", "effective_rank", "stable_rank", "participation_ratio", "top_share"):
        assert there.metrics()[name] == pytest.approx(here.metrics()[name], rel=1e-6)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float64, 4), (torch.float32, 3), (torch.bfloat16, 2)])
def test_the_rank_cut_follows_the_dtype(dtype: torch.dtype, kept: int):
    """Eigenvalue ratios 1, 0.1, 1e-5, 1e-9 against N eps = 4 * (2e-16, 1.2e-7, 3.9e-3)."""
    K = torch.diag(4 * torch.tensor([1.0, 0.1, 1e-5, 1e-9], dtype=torch.float64))
    assert spectrum_of_gram(K, num_params=100, dtype=dtype).rank == kept


def test_unbiased_statistics_are_unbiased():
    """Over many small draws, their mean is the population's value, where the plug-in ones are far off."""
    scales = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.5, 0.5])
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0, 1.0])
    found = []
    for _ in range(400):
        G = (torch.randn(6, 6, generator=generator) * scales + mean).double()
        found.append(spectrum_of(G).metrics()["mean_gradient_norm_squared"])
    found = torch.tensor(found)
    assert abs(found.mean() - (mean @ mean)) < 4 * found.std() / math.sqrt(400)


@pytest.mark.parametrize(("N", "P"), SHAPES)
def test_centring_the_gram_is_centring_the_gradients(N: int, P: int):
    G = gradients(N, P)
    difference = G - G.mean(0)
    assert torch.allclose(centred(G @ G.T), difference @ difference.T, atol=1e-12)


def weighted(N: int, P: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (S, P) of N rows, one to four each, with weights (S,) and rows (S,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(N).repeat_interleave(torch.randint(1, 5, (N,), generator=generator))
    rows = rows[torch.randperm(len(rows), generator=generator)]
    return gradients(len(rows), P, seed=seed), torch.rand(len(rows), generator=generator).double() + 0.5, rows


@pytest.mark.parametrize("center", [False, True])
def test_weighted_gradients_by_the_sums_they_stand_for(center: bool):
    G, w, rows = weighted(6, 9)
    root = w.sqrt()[:, None] * G
    total = float(w.sum())
    mean = sum(float(a) * g for a, g in zip(w, G, strict=True)) / total
    dense = sum(float(a) * torch.outer(g, g) for a, g in zip(w, G, strict=True)) / total
    dense = dense - torch.outer(mean, mean) if center else dense
    found = spectrum_of_gram(
        root @ root.T, num_params=9, dtype=torch.float64, normaliser=total, weights=w, samples=rows, center=center
    )
    assert torch.allclose(found.eigenvalues, torch.linalg.eigvalsh(dense).flip(0)[: found.rank], rtol=1e-9)
    assert found.trace == pytest.approx(torch.trace(dense).item())
    assert found.num_samples == len(G)


def test_pair_statistics_are_over_pairs_of_different_rows():
    G, w, rows = weighted(6, 9)
    root = w.sqrt()[:, None] * G
    options = {"num_params": 9, "dtype": torch.float64, "normaliser": float(w.sum()), "weights": w, "samples": rows}
    found = spectrum_of_gram(root @ root.T, **options).metrics()
    pairs = [(s, t) for s in range(len(G)) for t in range(len(G)) if rows[s] != rows[t]]
    dots = math.fsum(float(w[s] * w[t] * (G[s] @ G[t])) for s, t in pairs)
    assert found["mean_gradient_norm_squared"] == pytest.approx(dots / math.fsum(float(w[s] * w[t]) for s, t in pairs))
    products = math.fsum(float(root[s] @ root[s]) * float(root[t] @ root[t]) for s, t in pairs)
    squares = math.fsum(float(root[s] @ root[t]) ** 2 for s, t in pairs)
    assert found["participation_ratio_unbiased"] == pytest.approx(products / squares)


def test_pair_statistics_of_a_centred_spectrum_are_those_of_the_gradients():
    """Of centred gradients the mean over pairs is -trace/(N-1), whatever they are, and no pair is independent."""
    G = gradients(7, 5)
    plain, found = (spectrum_of_gram(G @ G.T, num_params=5, dtype=G.dtype, center=c).metrics() for c in (False, True))
    assert found["mean_gradient_norm_squared"] == pytest.approx(plain["mean_gradient_norm_squared"])
    assert "participation_ratio_unbiased" not in found
    assert found["trace"] == pytest.approx((G - G.mean(0)).square().sum().item() / 7)


def test_a_mean_of_zero_by_definition_is_neither_subtracted_nor_reported():
    G, w, rows = weighted(4, 6)
    plain, found = (
        spectrum_of_gram(
            G @ G.T, num_params=6, dtype=G.dtype, normaliser=4, weights=torch.zeros_like(w), samples=rows, center=center
        )
        for center in (False, True)
    )
    assert torch.equal(plain.eigenvalues, found.eigenvalues)
    assert "mean_gradient_norm_squared" not in plain.metrics()
    assert "participation_ratio_unbiased" in plain.metrics()


def test_gradients_of_one_row_have_no_pairs():
    G = gradients(4, 6)
    found = spectrum_of_gram(G @ G.T, num_params=6, dtype=G.dtype, samples=torch.zeros(4, dtype=torch.int64))
    assert found.rank == 4
    assert not found.pair_statistics


def test_the_unbiased_participation_ratio_of_tokens_is_unbiased():
    """Of both traces: rows of correlated tokens, against the population's, which the pairs within rows would miss."""
    scales = torch.tensor([2.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(5).repeat_interleave(3)
    parts = []
    for _ in range(400):
        shared = torch.randn(5, 1, 4, generator=generator, dtype=torch.float64).expand(5, 3, 4).reshape(15, 4)
        G = (shared + torch.randn(15, 4, generator=generator, dtype=torch.float64)) / math.sqrt(2) * scales
        K = G @ G.T
        apart = rows[:, None] != rows
        found = spectrum_of_gram(K, num_params=4, dtype=K.dtype, samples=rows).metrics()["participation_ratio_unbiased"]
        squares = K[apart].square().mean().item()
        parts.append((found * squares, squares))
    products, squares = torch.tensor(parts, dtype=torch.float64).T
    F_ = scales.square()
    assert abs(squares.mean() - F_.square().sum()) < 4 * squares.std() / 20
    assert abs(products.mean() - F_.sum() ** 2) < 4 * products.std() / 20


def test_union_is_the_spectrum_of_the_block_diagonal_matrix():
    parts = {"a": gradients(5, 4, seed=1), "b": 3 * gradients(5, 7, seed=2), "c": gradients(5, 2, seed=3)}
    dense = torch.block_diag(*(dense_fisher(G) for G in parts.values()))
    found = union({name: spectrum_of(G) for name, G in parts.items()}, dtype=torch.float64)
    assert torch.allclose(found.eigenvalues, torch.linalg.eigvalsh(dense).flip(0)[: found.rank])
    assert (found.num_samples, found.num_params, found.rank) == (5, 13, 4 + 5 + 2)
    assert found.trace == pytest.approx(torch.trace(dense).item())
    assert "mean_gradient_norm_squared" not in found.metrics()


def test_union_cuts_again_relative_to_its_largest():
    parts = {"a": spectrum_of(gradients(4, 6)), "b": spectrum_of(1e-8 * gradients(4, 6))}
    assert union(parts, dtype=torch.float64).rank == 4
    assert union({}, dtype=torch.float64).rank == 0


@pytest.mark.parametrize("gram", [torch.zeros(0, 0), torch.zeros(4, 4)])
def test_no_sample_or_no_gradient_gives_an_empty_spectrum(gram: Tensor):
    found = spectrum_of_gram(gram, num_params=7, dtype=torch.float32)
    assert found.eigenvalues.dtype == torch.float64
    assert found.metrics() == {"rank": 0.0, "num_samples": float(len(gram)), "trace": 0.0}


def test_nothing_is_added_while_the_eigensolver_works():
    assert spectrum_of(gradients(6, 2)).jitter == 0.0


def break_eigensolver(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, calls = torch.linalg.eigvalsh, []

    def eigvalsh(matrix: Tensor) -> Tensor:
        calls.append(matrix)
        if len(calls) <= times:
            raise LinAlgError("did not converge")
        return solve(matrix)

    monkeypatch.setattr(module.torch.linalg, "eigvalsh", eigvalsh)


@pytest.mark.parametrize(("failures", "relative"), [(1, 1e-14), (3, 1e-10)])
def test_a_failing_eigensolver_gets_the_smallest_jitter_that_works(
    failures: int, relative: float, monkeypatch: pytest.MonkeyPatch
):
    G = gradients(6, 20)
    expected = fisher_eigenvalues(G)
    break_eigensolver(failures, monkeypatch)
    with pytest.warns(UserWarning, match="diagonal"):
        found = spectrum_of(G)
    assert found.jitter == pytest.approx(relative * found.trace / 6)
    assert torch.allclose(found.eigenvalues, expected, rtol=1e-8)


def test_an_eigensolver_that_always_fails_raises(monkeypatch: pytest.MonkeyPatch):
    break_eigensolver(99, monkeypatch)
    with warnings.catch_warnings(), pytest.raises(LinAlgError, match="finite"):
        spectrum_of(gradients(3, 3))
