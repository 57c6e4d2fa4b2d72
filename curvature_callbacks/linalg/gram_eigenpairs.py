"""Eigenpairs of `J' J / c` from the Gram `J J'` (S, S): no Krylov space, and J (S, P) is never held."""

import time
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.linalg.direct import NullVectors, direct_eigenpairs
from curvature_callbacks.linalg.eigenpairs import Eigenpairs, noise_floor
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.wanted import Wanted
from curvature_callbacks.linalg.operator import JacobianOperator


def eigenpairs_of_gram(
    gram: Tensor, operator: JacobianOperator, options: LanczosOptions, *, projections: int = 2
) -> Eigenpairs:
    """The `k` outer eigenpairs of `A = J' J / c`, with true residuals.

    From `J J' w = s w` follow `A u = (s / c) u` with `u = J' w / sqrt(s)`: one backward pass each. Beyond the rank r of J all
    eigenvalues are zero, exactly so for r <= S < P; a wanted zero is reported with a vector of the null space, found by
    projection. So the ends are those of the P x P matrix, as from `lanczos`: `BE` and `SA` of fewer samples than parameters
    hold zeros (ask for `LA` to spend all k on the top). Eigenvalues below `10 eps lambda_max` count as zero.

    A pair whose residual misses `tol` has rounding errors along the other eigenvectors; these are known from `J u` and are
    projected out, at most `projections` times.

    Args:
        gram: (S, S) `J J'`, finite.
        operator: A.
        options: at most P of `k` pairs are returned; of the ends `LM` is the largest here; a pair has converged when its
            residual is at most `max(tol theta, 10 eps lambda_max)`; `seed` is that of the start vectors in the null space.
        projections: most projections of a pair that misses `tol`.

    Returns:
        The pairs, eigenvalues descending; `reorth_mode` is `gram` and `asymmetry` the Gram's.

    Cost: an S x S eigensolve in float64, and per pair three halves of a product; one more for each projection, one less half
    for a zero. Memory: k vectors of size P.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> J = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        >>> A = SimpleNamespace(
        ...     shape=(3, 3), dtype=J.dtype, device=J.device, normaliser=2, jvp=lambda v: J @ v, vjp=lambda u: J.T @ u
        ... )
        >>> eigenpairs_of_gram(J @ J.T, A, LanczosOptions(k=3)).eigenvalues.tolist()
        [4.5, 0.5, 0.0]
    """
    start = time.perf_counter()
    search = _GramSearch(gram, operator, options.seed, projections)
    return direct_eigenpairs(search, options, solver="gram", start=start)


@final
class _GramSearch:
    """The spectrum of the Gram and what turns it into vectors. Index i counts the P eigenvalues of A from the largest."""

    def __init__(self, gram: Tensor, operator: JacobianOperator, seed: int, projections: int) -> None:
        K = gram.to("cpu", torch.float64)
        size = K.abs().max().item()
        self.asymmetry = (K - K.T).abs().max().item() / size if size > 0 else 0.0
        values, vectors = torch.linalg.eigh((K + K.T) / 2)
        top = max(values[-1].item(), 0.0)
        noise = noise_floor(operator.dtype, top)
        self._products = InnerProducts(operator)
        self.dimension = self._products.dimension(operator.shape[0])
        rank = min(int((values > noise).sum()), self.dimension)
        self.squares = values.flip(0)[:rank]  # (r,) eigenvalues of J J'
        self.weights = vectors.flip(1)[:, :rank]  # (S, r)
        self.scale = top / operator.normaliser
        self.floor = noise / operator.normaliser
        self._operator = operator
        self._projections = projections
        self._null = NullVectors(operator, seed)
        self._half_products = 0

    @property
    def num_matvecs(self) -> int:
        return -(-self._half_products // 2)

    def solve(self, ends: Wanted, tol: float) -> tuple[Tensor, Tensor, Tensor]:
        chosen = [*range(ends.upper), *range(self.dimension - ends.lower, self.dimension)]
        num_images = sum(index < len(self.squares) for index in chosen)  # null vectors come last
        P = self._operator.shape[0]
        vectors = torch.empty(len(chosen), P, dtype=self._operator.dtype, device=self._operator.device)  # (k, P)
        values, residuals = [], []
        for i, index in enumerate(chosen):
            values.append(self._value(index))
            vectors[i], residual = self._pair(index, values[-1], vectors[num_images:i], tol)
            residuals.append(residual)
        return torch.stack(values), vectors, torch.stack(residuals)

    def _value(self, index: int) -> Tensor:
        """Eigenvalue `index` of A, 0-d float64; zero beyond the rank."""
        square: Tensor = self.squares[index : index + 1].sum()  # of none beyond the rank
        return square / self._operator.normaliser

    def _pair(self, index: int, value: Tensor, before: Tensor, tol: float) -> tuple[Tensor, Tensor]:
        """Eigenvector `index` (P,) of this `value`, orthogonal to the null vectors `before` (n, P), and its residual, 0-d."""
        target = max(tol * value.item(), self.floor)
        u = self._start(index)
        for projections_left in reversed(range(self._projections + 1)):
            self._null.normalise(u, before, passes=2)
            image = self._jvp(u)
            residual = self._products.norm(self._vjp(image) / self._operator.normaliser - value.to(u) * u).cpu()
            if projections_left == 0 or residual <= target:
                break
            u = self._projected(u, image, index)
        return u, residual

    def _start(self, index: int) -> Tensor:
        """An approximate eigenvector `index` (P,), of any length."""
        if index < len(self.squares):
            return self._vjp(self.weights[:, index])
        u = self._null.draw()
        return self._projected(u, self._jvp(u), index)

    def _projected(self, u: Tensor, image: Tensor, index: int) -> Tensor:
        """`u` without its components `w_j' J u / sqrt(s_j)` along the eigenvectors `J' w_j / sqrt(s_j)` other than `index`."""
        shares = (self.weights.T @ image.to(self.weights)) / self.squares  # (r,)
        shares[index : index + 1] = 0.0
        return u - self._vjp(self.weights @ shares)

    def _jvp(self, v: Tensor) -> Tensor:
        self._half_products += 1
        return self._operator.jvp(v)

    def _vjp(self, u: Tensor) -> Tensor:
        self._half_products += 1
        return self._operator.vjp(u.to(self._operator.device, self._operator.dtype))
