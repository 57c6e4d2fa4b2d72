"""Operators, spectra and answers the eigensolver's tests share."""

import time
from typing import Any

import torch
from torch import Tensor

from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.operator import MatrixOperator
from curvature_callbacks.space import LocalSpace

DTYPES = (torch.float64, torch.float32)
ENDS = ("LA", "SA", "LM", "BE")


class Counted(LocalSpace):
    """A matrix operator that counts its products and stops a run that would never end. It is its own space.

    As a space it notes every pass: (products so far, basis vectors that were passed over).
    """

    is_psd = False

    def __init__(self, matrix: Tensor, *, limit: int = 400, seconds: float = 0.0, reads_are_free: bool = True) -> None:
        self._inner = MatrixOperator(matrix)
        self.space = self
        self.reads_are_free = reads_are_free
        self.passes: list[tuple[int, int]] = []
        self.shape, self.dtype, self.device = self._inner.shape, self._inner.dtype, self._inner.device
        self.products = 0
        self._limit = limit
        self._seconds = seconds  # that each product takes at least

    def matmat(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        assert self.products <= self._limit, "the run does not end"
        time.sleep(self._seconds)
        return self._inner.matmat(V)

    def total(self, partial: Tensor) -> Tensor:
        if partial.ndim == 1:
            self.passes.append((self.products, len(partial)))
        return partial

    def num_passes(self, *, beyond: int = 0) -> int:
        """Steps with a pass over more vectors than these."""
        return len({product for product, vectors in self.passes if vectors > beyond})


def symmetric(eigenvalues: Tensor, *, seed: int = 0) -> Tensor:
    """A dense float64 matrix with the given eigenvalues in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    A = Q @ torch.diag(eigenvalues.double()) @ Q.T
    return (A + A.T) / 2


def reflected(eigenvalues: Tensor) -> Tensor:
    """Likewise by two reflections, for large ones."""
    generator = torch.Generator().manual_seed(0)
    A = torch.diag(eigenvalues.double())
    for _ in range(2):
        v = torch.randn(len(A), generator=generator, dtype=torch.float64)
        v /= v.norm()
        A -= 2 * torch.outer(v, v @ A)
        A -= 2 * torch.outer(A @ v, v)
    return (A + A.T) / 2


def wanted_values(eigenvalues: Tensor, k: int, which: str) -> Tensor:
    """The k values `which` asks for, descending, picked from a sorted list."""
    values = sorted(eigenvalues.tolist())
    picked = {
        "LA": values[len(values) - k :],
        "SA": values[:k],
        "LM": sorted(values, key=abs)[len(values) - k :],
        "BE": values[: k // 2] + values[len(values) - (k - k // 2) :],
    }[which]
    return torch.tensor(sorted(picked, reverse=True), dtype=torch.float64)


def prescribed_spectra(size: int) -> dict[str, Tensor]:
    """Spectra that eigensolvers get wrong, each of `size` eigenvalues."""

    def of(*leading: float, rest: Tensor) -> Tensor:
        return torch.cat([torch.tensor(leading, dtype=torch.float64), rest.double()])

    return {
        "rank_one": of(3.0, rest=torch.zeros(size - 1)),
        "triple_top": of(5.0, 5.0, 5.0, rest=torch.linspace(-1.1, 3, size - 3, dtype=torch.float64)),
        "cluster": of(4 + 2e-6, 4 + 1e-6, 4.0, rest=torch.linspace(-1.9, 2, size - 3, dtype=torch.float64)),
        "identity": torch.ones(size, dtype=torch.float64),
        "zero": torch.zeros(size, dtype=torch.float64),
        "twelve_decades": torch.logspace(0, -12, size, dtype=torch.float64),
        "indefinite_with_zeros": of(5.0, 4.0, 2.5, 1.5, -0.5, -1.0, -3.0, rest=torch.zeros(size - 7)),
    }


def outliers_and_bulk(size: int, *, seed: int = 0) -> Tensor:
    """Like a trained net's Hessian: ten large eigenvalues, a bulk about zero, a small negative end."""
    generator = torch.Generator().manual_seed(seed)
    bulk = 0.2 * torch.randn(size - 15, generator=generator, dtype=torch.float64)
    outliers = 90 * 0.7 ** torch.arange(10, dtype=torch.float64)
    return torch.cat([outliers, bulk, torch.tensor([-1.1, -1.3, -1.6, -2.0, -3.0], dtype=torch.float64)])


def decaying(size: int, *, ratio: float = 0.95) -> Tensor:
    """Powers of `ratio`."""
    return ratio ** torch.arange(size, dtype=torch.float64)


def true_errors(A: Tensor, pairs: Eigenpairs) -> Tensor:
    """`||A v - theta v||` (k,) of the returned vectors in float64."""
    assert pairs.eigenvectors is not None
    V = pairs.eigenvectors.double()
    return (A @ V - V * pairs.eigenvalues).norm(dim=0)


def gram_error(V: Tensor) -> float:
    """Largest entry of `V' V - I` for columns V."""
    V = V.double()
    return (V.T @ V - torch.eye(V.shape[1], dtype=torch.float64)).abs().max().item()


def assert_flags_are_honest(A: Tensor, pairs: Eigenpairs, *, slack: float = 2.0) -> None:
    """What is called converged is: the true residual is within the tolerance, up to a small factor."""
    eps = torch.finfo(pairs.eigenvectors.dtype if pairs.eigenvectors is not None else torch.float64).eps
    allowed = (pairs.tol * pairs.eigenvalues.abs()).clamp_min(10 * eps * pairs.lambda_abs_max)
    excess = true_errors(A, pairs) - slack * allowed
    assert (excess[pairs.converged] <= 0).all(), (true_errors(A, pairs) / allowed).tolist()


def assert_distinct_eigenvalues(dense: Tensor, pairs: Eigenpairs, *, tolerance: float) -> None:
    """Every pair called converged stands for an eigenvalue of its own, so that no ghost is among them.

    Greedy, as both lists are sorted; `dense` are all eigenvalues.
    """
    free = sorted(dense.tolist(), reverse=True)
    for value in pairs.eigenvalues[pairs.converged].tolist():
        nearest = min(range(len(free)), key=lambda i: abs(free[i] - value))
        assert abs(free[nearest] - value) <= tolerance, f"{value} is a ghost or no eigenvalue"
        free.pop(nearest)


def tolerance_of(dtype: torch.dtype) -> dict[str, Any]:
    """The relative accuracy of the eigenvalues that every run must reach, and the `tol` to ask for."""
    return {"accuracy": 1e-8, "tol": 1e-10} if dtype == torch.float64 else {"accuracy": 2e-5, "tol": 1e-5}
