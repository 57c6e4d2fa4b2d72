"""Vectors in shards: the same eigenpairs as where one process holds all of them."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg.combination import LinearCombination
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.limits import LanczosLimits
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import lanczos, solve
from curvature_callbacks.linalg.operator import MatrixOperator
from tests.linalg.lanczos.lanczos_cases import Counted, outliers_and_bulk, symmetric, true_errors, wanted_values

VALUES = outliers_and_bulk(90)
PARTS = (slice(0, 55), slice(55, 90))


class Meeting:
    """Two threads that exchange what they bring, like two ranks; one that does not come breaks it."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._brought: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self._brought[rank] = tensor.clone()
        self._barrier.wait()
        found = list(self._brought)
        self._barrier.wait()
        return found


class Shard:
    """Half of the vectors of a matrix operator; also their space."""

    is_psd = False

    def __init__(self, A: Tensor, rank: int, meeting: Meeting) -> None:
        self._A, self._rank, self.meeting = A, rank, meeting
        self.rows = PARTS[rank]
        length = self.rows.stop - self.rows.start
        self.shape, self.dtype, self.device = (length, length), A.dtype, A.device
        self.space = self

    def total(self, partial: Tensor) -> Tensor:
        first, second = self.meeting.exchange(self._rank, partial)
        return first + second

    def seed(self, seed: int) -> int:
        return 2 * seed + self._rank

    def part(self, length: int) -> slice:
        return self.rows

    def assembled(self, part: Tensor, length: int) -> Tensor:
        return torch.cat(self.meeting.exchange(self._rank, part), 1)

    def matmat(self, V: Tensor) -> Tensor:
        return self._A[self.rows] @ torch.cat(self.meeting.exchange(self._rank, V))


def on_both(A: Tensor, work: Callable[[int, Shard], Any]) -> list[Any]:
    """What `work` returns on each of two shards that run in step."""
    meeting = Meeting()
    results: list[Any] = [None, None]

    def run(rank: int) -> None:
        results[rank] = work(rank, Shard(A, rank, meeting))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_inner_products_add_up_over_the_shards():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 90, generator=generator, dtype=torch.float64)
    alone = InnerProducts(MatrixOperator(torch.eye(90, dtype=torch.float64)))

    def work(rank: int, shard: Shard) -> dict[str, Any]:
        products, part = InnerProducts(shard), vectors[:, PARTS[rank]].contiguous()
        return {
            "dot": products.dot(part[0], part[1]),
            "norm": products.norm(part[2]),
            "coefficients": products.coefficients(part, part[3]),
            "gram": products.gram(part),
            "dimension": products.dimension(part.shape[1]),
            "anywhere": (products.anywhere(rank == 1), products.anywhere(False)),
            "average": products.average(10.0 * rank),
            "assembled": products.assembled(part[0]),
            "part": products.part(vectors[0]),
            "random": torch.randn(5, generator=products.random(3)),
        }

    first, second = on_both(torch.eye(90, dtype=torch.float64), work)
    assert first["dimension"] == second["dimension"] == alone.dimension(vectors.shape[1]) == 90
    assert first["anywhere"] == second["anywhere"] == (True, False)
    assert first["average"] == second["average"] == 5.0
    assert torch.equal(first["assembled"], vectors[0])
    assert torch.equal(second["assembled"], vectors[0])
    assert torch.equal(torch.cat([first["part"], second["part"]]), vectors[0])
    assert not torch.equal(first["random"], second["random"]), "parts of a random vector must not repeat"
    expected = {
        "dot": alone.dot(vectors[0], vectors[1]),
        "norm": alone.norm(vectors[2]),
        "coefficients": alone.coefficients(vectors, vectors[3]),
        "gram": alone.gram(vectors),
    }
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], value, rtol=1e-13, atol=1e-13), name


@pytest.mark.parametrize("mode", ["full", "partial", "selective", "off", "thick_restart", "auto"])
def test_shards_give_the_pairs_of_one_process(mode: str):
    A = symmetric(VALUES)
    options: dict[str, Any] = {"k": 6, "which": "BE", "tol": 1e-6, "reorth_mode": mode, "max_matvecs": 89}

    def work(rank: int, shard: Shard) -> Eigenpairs:
        return lanczos(shard, **options, seed=rank, return_eigenvectors=True, true_residuals=True)

    first, second = on_both(A, work)
    alone = lanczos(Counted(A), **options)
    assert alone.converged.all()
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(first.residuals, second.residuals)
    assert first.converged.all()
    assert torch.allclose(first.eigenvalues, alone.eigenvalues, rtol=1e-8)
    assert torch.allclose(first.eigenvalues, wanted_values(VALUES, 6, "BE"), rtol=1e-8)
    vectors = torch.cat([first.eigenvectors, second.eigenvectors])
    assert (A @ vectors - vectors * first.eigenvalues).norm(dim=0).max() <= 1e-4


def test_a_combination_of_shards_is_in_their_space():
    A, B = symmetric(VALUES), symmetric(VALUES.flip(0), seed=1)

    def work(rank: int, shard: Shard) -> Eigenpairs:
        other = Shard(B, rank, shard.meeting)
        other.space = shard.space
        return lanczos(LinearCombination([(2.0, shard), (-1.0, other)]), k=4, tol=1e-8, max_matvecs=90, seed=rank)

    first, second = on_both(A, work)
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.allclose(first.eigenvalues, torch.linalg.eigvalsh(2 * A - B).flip(0)[:4])


def test_multiplicities_over_shards():
    values = torch.tensor([5.0] * 3 + [1.0] * 87, dtype=torch.float64)
    first, second = on_both(symmetric(values), lambda rank, shard: lanczos(shard, k=5, tol=1e-8, seed=rank))
    assert torch.allclose(first.eigenvalues, values[:5])
    assert torch.equal(first.eigenvalues, second.eigenvalues)


def test_shards_with_different_clocks_stop_together():
    """One that went on alone would wait for the other forever."""

    def work(rank: int, shard: Shard) -> Eigenpairs:
        matmat = shard.matmat
        shard.matmat = lambda V: time.sleep(0.01) or matmat(V)  # type: ignore[func-returns-value, method-assign]
        return lanczos(shard, k=6, tol=1e-12, max_seconds=(0.04, 1e6)[rank], seed=rank)

    first, second = on_both(symmetric(VALUES), work)
    assert first.num_matvecs == second.num_matvecs < 40


def test_shards_with_different_memory_choose_the_same_mode():
    options = LanczosOptions(k=4, tol=1e-6, max_matvecs=80, return_eigenvectors=True)

    def work(rank: int, shard: Shard) -> Eigenpairs:
        room = (14, 28)[rank]
        return solve(shard, replace(options, seed=rank), limits=LanczosLimits(basis_bytes=room * 8 * 55))

    first, second = on_both(symmetric(VALUES), work)
    assert first.reorth_mode == second.reorth_mode == "thick_restart"
    assert first.num_matvecs == second.num_matvecs
    assert torch.allclose(first.eigenvalues, wanted_values(VALUES, 4, "LA"))


def test_true_residuals_are_over_all_shards():
    A = symmetric(VALUES)
    asked = {"k": 4, "max_matvecs": 12, "tol": 1e-12}
    first, _ = on_both(A, lambda rank, shard: lanczos(shard, **asked, seed=rank, true_residuals=True))
    alone = lanczos(Counted(A), **asked, return_eigenvectors=True, true_residuals=True)
    assert torch.allclose(alone.residuals, true_errors(A, alone), rtol=1e-9)
    assert first.residuals.shape == (4,)
    nearest = (first.eigenvalues[:, None] - VALUES).abs().min(1).values
    assert (nearest <= first.residuals * (1 + 1e-9)).all()
