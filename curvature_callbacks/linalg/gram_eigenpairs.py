"""Eigenpairs of `J' J / c` from the Gram `J J'` of its S rows: no Krylov space, no S x P matrix."""

import time
from typing import Final, Protocol, final

import torch
from torch import Tensor

from curvature_callbacks.linalg.accumulate import subtract_combination
from curvature_callbacks.linalg.eigenpairs import Eigenpairs, shortfalls
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.wanted import Which
from curvature_callbacks.linalg.operator import Operator

_NOISE: Final = 10.0  # noise floor of a residual and of an eigenvalue, in units of eps lambda_max, as in `lanczos`
_LOOKS: Final = 3  # at a residual, with a projection between two of them


class FactoredOperator(Operator, Protocol):
    """`A = J' J / normaliser`, with the products of both factors."""

    @property
    def normaliser(self) -> int:
        """What `J' J` is divided by."""
        ...

    def jvp(self, v: Tensor) -> Tensor:
        """`J v` (S,) for `v` (P,)."""
        ...

    def vjp(self, u: Tensor) -> Tensor:
        """`J' u` (P,) for `u` (S,)."""
        ...


def eigenpairs_of_gram(gram: Tensor, operator: FactoredOperator, options: LanczosOptions) -> Eigenpairs:
    """The `k` outer eigenpairs of `A = J' J / c`, with true residuals.

    From `J J' w = s w` follow `A u = (s / c) u` with `u = J' w / sqrt(s)`: one backward pass each. Beyond the rank r of J all
    eigenvalues are zero, exactly so for r <= S < P; a wanted zero is reported with a vector of the null space, found by
    projection. So the ends are those of the P x P matrix, as from `lanczos`: `BE` and `SA` of fewer samples than parameters
    hold zeros (ask for `LA` to spend all k on the top). Eigenvalues below `10 eps lambda_max` count as zero.

    A pair whose residual misses `tol` has rounding errors along the other eigenvectors; these are known from `J u` and are
    projected out, at most twice.

    Args:
        gram: (S, S) `J J'`, finite.
        operator: A.
        options: at most P of `k` pairs are returned; of the ends `LM` is the largest here; a pair has converged when its
            residual is at most `max(tol theta, 10 eps lambda_max)`; `seed` is that of the start vectors in the null space.

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
    start, k, tol = time.perf_counter(), options.k, options.tol
    search = _Search(gram, operator, tol, options.seed)
    P = search.dimension
    chosen = _choose(min(k, P), P, options.which)
    vectors = torch.empty(len(chosen), operator.shape[0], dtype=operator.dtype, device=operator.device)  # (k, P)
    residuals = torch.stack([search.find(index, vectors, place) for place, index in enumerate(chosen)])
    values = torch.stack([search.value(index) for index in chosen])
    converged = residuals <= (tol * values).clamp_min(search.floor)
    return Eigenpairs(
        eigenvalues=values,
        residuals=residuals.clamp_min(search.floor),
        converged=converged,
        eigenvectors=vectors.T if options.return_eigenvectors else None,
        num_matvecs=search.num_matvecs,
        which=options.which,
        reorth_mode="gram",
        is_psd=True,
        tol=tol,
        lambda_abs_max=search.scale,
        asymmetry=search.asymmetry,
        seconds=time.perf_counter() - start,
        warnings=shortfalls(converged, k, P, tol),
    )


@final
class _Search:
    """The spectrum of the Gram and what turns it into vectors. Index i counts the P eigenvalues of A from the largest."""

    def __init__(self, gram: Tensor, operator: FactoredOperator, tol: float, seed: int) -> None:
        K = gram.to("cpu", torch.float64)
        size = K.abs().max().item()
        self.asymmetry = (K - K.T).abs().max().item() / size if size > 0 else 0.0
        values, vectors = torch.linalg.eigh((K + K.T) / 2)
        top = max(values[-1].item(), 0.0)
        noise = _NOISE * torch.finfo(operator.dtype).eps * top
        self._products = InnerProducts(operator)
        self.dimension = self._products.dimension(operator.shape[0])
        rank = min(int((values > noise).sum()), self.dimension)
        self.squares = values.flip(0)[:rank]  # (r,) eigenvalues of J J'
        self.weights = vectors.flip(1)[:, :rank]  # (S, r)
        self.scale = top / operator.normaliser
        self.floor = noise / operator.normaliser
        self._operator = operator
        self._tol = tol
        self._generator = self._products.random(seed)
        self._null: list[int] = []  # places of the null vectors found so far
        self._half_products = 0

    @property
    def num_matvecs(self) -> int:
        return -(-self._half_products // 2)

    def value(self, index: int) -> Tensor:
        """0-d float64."""
        own: Tensor = self.squares[index : index + 1].sum()  # empty beyond the rank
        return own / self._operator.normaliser

    def find(self, index: int, vectors: Tensor, place: int) -> Tensor:
        """Put eigenvector `index` into `vectors[place]`; its residual, 0-d."""
        value = self.value(index)
        target = max(self._tol * value.item(), self.floor)
        null = index >= len(self.squares)
        u = self._start(index)
        for looks_left in reversed(range(_LOOKS)):
            self._normalise(u, vectors, null=null)
            image = self._jvp(u)
            residual = self._products.norm(self._vjp(image) / self._operator.normaliser - value.to(u) * u).cpu()
            if looks_left == 0 or residual <= target:
                break
            u = self._projected(u, image, index)
        vectors[place] = u
        if null:
            self._null.append(place)
        return residual

    def _start(self, index: int) -> Tensor:
        if index < len(self.squares):
            return self._vjp(self.weights[:, index])
        u = torch.randn(self._operator.shape[0], generator=self._generator, dtype=self._operator.dtype)
        u = u.to(self._operator.device)
        return self._projected(u, self._jvp(u), index)

    def _normalise(self, u: Tensor, vectors: Tensor, *, null: bool) -> None:
        """Unit length; null vectors, which the Gram does not tell apart, also orthogonal to those before."""
        for _ in range(2 if null and self._null else 0):
            before = vectors[self._null]
            subtract_combination(u, before, self._products.coefficients(before, u))
        u /= self._products.norm(u).clamp_min(torch.finfo(u.dtype).tiny)

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


def _choose(k: int, P: int, which: Which) -> list[int]:
    """Indices of the wanted ones among P eigenvalues in descending order, none negative."""
    bottom = {"LA": 0, "LM": 0, "SA": k, "BE": k // 2}[which]
    return [*range(k - bottom), *range(P - bottom, P)]
