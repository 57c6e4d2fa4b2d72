"""Direct solvers: eigenpairs of a positive semi-definite operator whose spectrum is known before any of its vectors."""

import time
from typing import Protocol, final

import torch
from torch import Tensor

from curvature_callbacks.linalg.accumulate import subtract_combination
from curvature_callbacks.linalg.eigenpairs import Eigenpairs, shortfalls
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.wanted import Wanted, wanted
from curvature_callbacks.linalg.operator import Operator


class DirectSearch(Protocol):
    """The spectrum of one operator, from a Gram or from factors, and how its vectors are made.

    Attributes:
        dimension: P, zeros included.
        scale: largest eigenvalue.
        floor: noise floor of a residual; smaller eigenvalues count as zero.
        asymmetry: of what the spectrum was taken from, relative to its largest entry.
    """

    dimension: int
    scale: float
    floor: float
    asymmetry: float

    @property
    def num_matvecs(self) -> int:
        """Products with the operator spent so far."""
        ...

    def solve(self, ends: Wanted, tol: float) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues (k,) descending, unit eigenvectors (k, P), and true residuals (k,) on the CPU."""
        ...


def direct_eigenpairs(search: DirectSearch, options: LanczosOptions, *, solver: str, start: float) -> Eigenpairs:
    """The outer eigenpairs that `search` finds, zeros beyond the rank included.

    Args:
        search: the spectrum.
        options: at most P of `k` pairs are returned; one has converged when its residual is at most `max(tol theta, floor)`.
        solver: `reorth_mode` of the pairs.
        start: value of `time.perf_counter()` when the work began.
    """
    k, tol, P = options.k, options.tol, search.dimension
    values, vectors, residuals = search.solve(wanted(min(k, P), options.which), tol)
    converged = residuals <= (tol * values).clamp_min(search.floor)
    return Eigenpairs(
        eigenvalues=values,
        residuals=residuals.clamp_min(search.floor),
        converged=converged,
        eigenvectors=vectors.T if options.return_eigenvectors else None,
        num_matvecs=search.num_matvecs,
        which=options.which,
        reorth_mode=solver,
        is_psd=True,
        tol=tol,
        lambda_abs_max=search.scale,
        asymmetry=search.asymmetry,
        seconds=time.perf_counter() - start,
        warnings=shortfalls(converged, k, P, tol),
    )


@final
class NullVectors:
    """An orthonormal set of vectors with eigenvalue zero, made of random ones.

    A spectrum does not tell them apart, so each is made orthogonal to those before. What a random vector has in the range, the
    solver projects out.

    Args:
        operator: the operator, whose space, dtype and device the vectors have.
        seed: of the random vectors.
    """

    def __init__(self, operator: Operator, seed: int) -> None:
        self._operator = operator
        self._products = InnerProducts(operator)
        self._generator = self._products.random(seed)

    def draw(self) -> Tensor:
        """A random vector (P,), of no particular length."""
        size, dtype = self._operator.shape[0], self._operator.dtype
        return torch.randn(size, generator=self._generator, dtype=dtype).to(self._operator.device)

    def normalise(self, v: Tensor, before: Tensor, *, passes: int) -> None:
        """Take from `v` (P,) its components along the vectors `before` (n, P), so many times, then divide it by its length."""
        for _ in range(passes if len(before) else 0):
            subtract_combination(v, before, self._products.coefficients(before, v))
        v /= self._products.norm(v).clamp_min(torch.finfo(v.dtype).tiny)
