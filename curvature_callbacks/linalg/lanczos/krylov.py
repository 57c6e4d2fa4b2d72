"""Krylov: the basis of one Lanczos run; its steps, its deflation and its restarts.

After every step, to rounding,

    A Q = Q (H + C) + beta q e'

with Q = `basis[:size]` as columns, q = `basis[size]` the next vector and e the last unit vector. H is symmetric, and
tridiagonal (a: alphas, b: betas) until a restart. After one, the first of the m basis vectors are kept ones:

                 locked   others     steps since the restart
               +-------------------+-------------------------+
       locked  |                   |  c    c    c    c    c  |      core  the old H in the coordinates of the kept
               |       core        |                         |            vectors; diagonal where they are Ritz vectors
       others  |                   |  s                      |      s     spokes: beta times the last coordinate of each
               |                   |  s                      |            kept vector, its coupling to the next one
               +-------------------+-------------------------+      c     measured couplings to locked vectors, to which
               |  c   c    s   s   |  a    b                 |            their residuals lead back: from `corrections`
               |  c   c            |  b    a    b            |
        steps  |  c   c            |       b    a    b       |
               |  c   c            |            b    a    b  |
               |  c   c            |                 b    a  |
               +-------------------+-------------------------+

*Locked* vectors are Ritz vectors of earlier segments. A *segment* begins with a vector that is not the continuation of the one
before: after a vanished beta, or where copies of what has converged are looked for in its complement. Then all kept vectors are
locked, and what A does to them outside Q is known by its norm only (`cut_off`).

C holds the components that reorthogonalisation took from the product of each vector, in its column, but for those of locked
vectors that are in H: rounding where every step has a pass, at most `sqrt(eps)` in `partial`, anything in `selective`, nothing
in `off`.
"""

from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.errors import ProbeError
from curvature_callbacks.linalg.accumulate import subtract_combination
from curvature_callbacks.linalg.eigenpairs import noise_floor
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.projection import Projection
from curvature_callbacks.linalg.lanczos.reorthogonalisation import Full, Reorthogonalisation
from curvature_callbacks.linalg.operator import Operator

_SECOND_PASS: Final = 0.7  # a pass that shrinks the vector below this share is repeated (Daniel et al. 1976: 1/sqrt(2))


@final
class Krylov:
    """A Krylov basis and the projection of the operator onto it. Everything stays on the operator's device between looks.

    Args:
        operator: A.
        capacity: most basis vectors; the memory is `capacity + 1` vectors.
        seed: of random vectors.
        start: (P,) first vector, default random.
        policy: how much is orthogonalised beyond the three-term recurrence.
        restart_columns: columns of the basis that a restart rotates at a time, so that it takes no second basis.

    Attributes:
        basis: (capacity + 1, P).
        projection: H and C.
        start: first vector of the current segment.
        num_matvecs: products spent.
    """

    def __init__(
        self,
        operator: Operator,
        capacity: int,
        *,
        seed: int,
        start: Tensor | None = None,
        policy: Reorthogonalisation | None = None,
        restart_columns: int = 1 << 16,
    ) -> None:
        self.operator = operator
        self.products = InnerProducts(operator)
        P = operator.shape[0]
        self.basis = torch.empty(capacity + 1, P, dtype=operator.dtype, device=operator.device)  # (capacity + 1, P)
        self.dimension = self.products.dimension(P)
        self.capacity = min(capacity, self.dimension)
        self.projection = Projection(self.capacity, operator.device)
        self.start = 0
        self.num_matvecs = 0
        self.policy = Full() if policy is None else policy
        self._restart_columns = restart_columns
        self._generator = self.products.random(seed)
        self._settled = 0  # steps that `settle` has judged
        if start is None:
            self._put_random(0)
        else:
            self.basis[0] = start / self.products.norm(start)

    @property
    def size(self) -> int:
        """m, vectors whose product is done."""
        return self.projection.size

    @property
    def finished(self) -> bool:
        """Whether the basis has no room for another step."""
        return self.size == self.capacity

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size == self.dimension and self.policy.orthonormal

    @property
    def eps(self) -> float:
        """Machine epsilon of the basis's dtype."""
        return float(torch.finfo(self.basis.dtype).eps)

    def step(self) -> None:
        """One product, the three-term recurrence, then what the policy asks for."""
        H, j = self.projection, self.size
        q = self.basis[j]
        w = self.basis[j + 1].copy_(self.operator.matmat(q[:, None])[:, 0])
        self.num_matvecs += 1
        H.alphas[j] = alpha = self.products.dot(q, w)
        if j == H.kept:
            subtract_combination(w, self.basis[: j + 1], torch.cat([H.spokes, alpha[None]]))
        else:
            H.asymmetries[j] = self.products.dot(self.basis[j - 1], w) - H.betas[j - 1]
            subtract_combination(w, self.basis[j - 1 : j + 1], torch.stack([H.betas[j - 1], alpha]))
        H.betas[j] = beta = self._orthogonalised(w, j + 1)
        w /= beta.to(w.dtype).clamp_min(torch.finfo(w.dtype).tiny)
        H.size = j + 1

    def settle(self) -> None:
        """Drop the steps that proved lost since the last look; where reads are not free the only host synchronisation.

        Steps after a vanished beta span an invariant subspace with rounding: the run continues with a random vector in the
        complement. Steps from a vector that the policy calls not orthogonal are done again, from that vector made orthogonal.

        Raises:
            ProbeError: a product is not finite.
        """
        H = self.projection
        if not H.is_finite():
            raise ProbeError("the operator's products are not finite: it has no eigenpairs and no spectrum.")
        floor = noise_floor(self.basis.dtype, H.scale())
        vanished = H.first_vanished(max(self._settled, H.kept), floor)  # kept vectors have no beta
        recurrence = H.recurrence(min(self.size, self.dimension - 1) if vanished is None else vanished)
        lost = self.policy.observe(recurrence)
        if lost is not None:
            self._go_back(lost, floor)
        elif vanished is not None:
            self._deflate(vanished)
        H.asymmetry = H.largest_asymmetry(self.size)  # steps that were given up say nothing
        self._settled = self.size

    def removed(self) -> Tensor | None:
        """C (m, m) on the CPU; None where every step has a pass, and C is rounding."""
        return None if self.policy.at_every_step else self.projection.removed()

    def last_beta(self) -> float:
        """The coupling of `basis[size]`; zero where there is nothing left."""
        return 0.0 if self.exhausted else float(self.projection.betas[self.size - 1])

    def vectors(self, coordinates: Tensor) -> Tensor:
        """(P, k) from coordinates (m, k) in the basis; every column in one piece, which took a third of the time."""
        weights = coordinates.T.to(self.basis)
        columns: Tensor = (weights @ self.basis[: weights.shape[1]]).T
        return columns

    def restart(self, coordinates: Tensor, *, locked: int) -> None:
        """Keep `Q coordinates` (m, l), orthonormal; the vector after the basis stays the next one.

        Args:
            coordinates: the last coordinate of the first `locked` of them is zero.
            locked: how many, from the first, belong to segments before the current one.
        """
        following = self.basis[self.size].clone()
        spokes = self.last_beta() * coordinates[-1]
        self._keep(coordinates, spokes, core=coordinates.T @ self.projection.matrix() @ coordinates, locked=locked)
        self.start = locked
        self.basis[self.size] = following

    def begin_segment(self, coordinates: Tensor, values: Tensor, residuals: Tensor) -> None:
        """Keep the Ritz vectors `Q coordinates` (m, l) of `values` (l,) and go on with a random vector in their complement.

        Args:
            coordinates: of the vectors; eigenvectors of `H + C`, so that H says nothing about them.
            values: their Ritz values.
            residuals: (l,) norms of what is cut off.
        """
        self._keep(coordinates, torch.zeros_like(residuals), core=torch.diag(values), locked=len(residuals))
        self.projection.cut(residuals)
        self.start = self.size
        self._put_random(self.size)

    def _keep(self, coordinates: Tensor, spokes: Tensor, *, core: Tensor, locked: int) -> None:
        m, kept = coordinates.shape
        weights = coordinates.T.to(self.basis)
        for columns in torch.split(self.basis, self._restart_columns, dim=1):
            columns[:kept] = weights @ columns[:m]
        self.projection.keep(coordinates, spokes, core=core, locked=locked)
        self._settled = kept

    def _put_random(self, index: int) -> None:
        """Make `basis[index]` a random unit vector orthogonal to those before; zero where they span the whole space."""
        if index >= self.dimension:
            self.basis[index].zero_()
            return
        q = torch.randn(self.basis.shape[1], generator=self._generator, dtype=self.basis.dtype).to(self.basis.device)
        for _ in range(3 if index else 0):
            q /= self.products.norm(q)
            subtract_combination(q, self.basis[:index], self.products.coefficients(self.basis[:index], q))
        self.basis[index] = q / self.products.norm(q)
        self.policy.reset(index)

    def _deflate(self, j: int) -> None:
        """Step j left nothing: a new segment begins after it."""
        self.projection.discard(j + 1)
        self.start = j + 1
        self.projection.betas[j] = 0.0
        self._put_random(j + 1)

    def _go_back(self, index: int, floor: float) -> None:
        """Give up the steps from vector `index` on, and make it orthogonal to those before."""
        H = self.projection
        H.discard(index)
        w = self.basis[index]
        for _ in range(2):
            self._pass(w, slice(0, index), column=index - 1, scale=H.betas[index - 1])
        length = self.products.norm(w)
        H.betas[index - 1] *= length
        if H.betas[index - 1] <= floor:
            self._deflate(index - 1)
            return
        w /= length.to(w.dtype)
        self.policy.reset(index)

    def _orthogonalised(self, w: Tensor, count: int) -> Tensor:
        """The norm of `w` after passes over those of the `count` vectors before it that `_to_pass` names."""
        vectors = self._to_pass(count)
        if vectors is None:
            return self.products.norm(w)
        before = self.products.norm(w)
        self._pass(w, vectors)
        after = self.products.norm(w)
        if not self.products.reads_are_free or after < _SECOND_PASS * before:
            self._pass(w, vectors)
            after = self.products.norm(w)
        return after

    def _to_pass(self, count: int) -> slice | None:
        """Which of the first `count` basis vectors the next one is orthogonalised against; None: none."""
        asked = self.policy.vectors(count)
        if self.policy.orthonormal and count == self.dimension:
            return slice(0, count)  # all that is left lies in their span
        if asked is None and self.projection.locked:
            return slice(0, self.projection.locked)  # their residuals lead back to them
        return asked

    def _pass(self, w: Tensor, vectors: slice, *, column: int | None = None, scale: Tensor | float = 1.0) -> None:
        """Take from `w` its components along these basis vectors, and note them, times `scale`, in a column of C."""
        basis = self.basis[vectors]
        components = self.products.coefficients(basis, w)
        subtract_combination(w, basis, components)
        self.projection.corrections[vectors, self.size if column is None else column] += components * scale
