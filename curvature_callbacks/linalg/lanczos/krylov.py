"""Krylov: the basis of one Lanczos run and the operator projected onto it; steps, deflation and restarts."""

from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.linalg.accumulate import subtract_combination
from curvature_callbacks.linalg.eigenpairs import NOISE
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.reorthogonalisation import Full, Reorthogonalisation
from curvature_callbacks.linalg.operator import Operator

_SECOND_PASS: Final = 0.7  # a pass that shrinks the vector below this share is repeated (Daniel et al. 1976: 1/sqrt(2))
_RESTART_COLUMNS: Final = 1 << 16  # columns rotated at a time: a restart takes no second basis


@final
class Krylov:
    """`A Q = Q H + beta q e'` with Q = `basis[:size]`, q = `basis[size]` and H = `projected()`.

    H is tridiagonal, `alphas` and `betas`. After a restart its first `kept` rows are the old H in the coordinates of the kept
    vectors, and their couplings ("spokes") to the vector after them. A *segment* begins with each vector that is not the
    continuation of the one before: at `start`. Everything stays on the operator's device between looks.

    Args:
        operator: A.
        capacity: most basis vectors; the memory is `capacity + 1` vectors.
        seed: of random vectors.
        start: (P,) first vector, default random.
        policy: how much is orthogonalised beyond the three-term recurrence.

    Attributes:
        basis: (capacity + 1, P).
        alphas: (capacity,) float64 on the operator's device.
        betas: (capacity,), likewise.
        size: m, vectors whose product is done.
        start: first vector of the current segment.
        num_matvecs: products spent.
        num_passes: steps that were orthogonalised against all vectors.
    """

    def __init__(
        self,
        operator: Operator,
        capacity: int,
        *,
        seed: int,
        start: Tensor | None = None,
        policy: Reorthogonalisation | None = None,
    ) -> None:
        self.operator = operator
        self.products = InnerProducts(operator)
        P = operator.shape[0]
        self.basis = torch.empty(capacity + 1, P, dtype=operator.dtype, device=operator.device)  # (capacity + 1, P)
        self.dimension = self.products.dimension(P)
        self.capacity = min(capacity, self.dimension)
        self.alphas, self.betas, self.asymmetries = torch.zeros(
            3, self.capacity, dtype=torch.float64, device=operator.device
        ).unbind()
        self.corrections = torch.zeros(self.capacity, self.capacity, dtype=torch.float64, device=operator.device)
        self.spokes = self.alphas.new_zeros(0)  # (kept,) couplings of the kept vectors to the one after them
        self._core = torch.zeros(0, 0, dtype=torch.float64)  # (kept, kept) on the CPU
        self._inherited = torch.zeros(0, dtype=torch.float64)  # (kept,) on the CPU: norms of residuals that were cut off
        self._locked = 0  # the first of the kept, of earlier segments: not coupled by the recurrence
        self.size = 0
        self.start = 0
        self.num_matvecs = 0
        self.num_passes = 0
        self.asymmetry = 0.0
        self.policy = Full() if policy is None else policy
        self._generator = self.products.random(seed)
        self._settled = 0  # steps whose beta was looked at
        if start is None:
            self.place_random(0)
        else:
            self.basis[0] = start / self.products.norm(start)

    @property
    def kept(self) -> int:
        """Vectors carried over from before the last restart."""
        return len(self.spokes)

    @property
    def finished(self) -> bool:
        """Whether the basis is full."""
        return self.size == self.capacity

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size == self.dimension and self.policy.orthonormal

    @property
    def eps(self) -> float:
        """Of the basis's dtype."""
        return float(torch.finfo(self.basis.dtype).eps)

    def step(self) -> None:
        """One product, the three-term recurrence, then what the policy asks for."""
        j = self.size
        q = self.basis[j]
        w = self.basis[j + 1].copy_(self.operator.matmat(q[:, None])[:, 0])
        self.num_matvecs += 1
        self.alphas[j] = alpha = self.products.dot(q, w)
        if j == self.kept:
            subtract_combination(w, self.basis[: j + 1], torch.cat([self.spokes, alpha[None]]))
        else:
            self.asymmetries[j] = self.products.dot(self.basis[j - 1], w) - self.betas[j - 1]
            subtract_combination(w, self.basis[j - 1 : j + 1], torch.stack([self.betas[j - 1], alpha]))
        self.betas[j] = beta = self._orthogonalised(w, j + 1)
        w /= beta.to(w.dtype).clamp_min(torch.finfo(w.dtype).tiny)
        self.size = j + 1

    def look(self) -> bool:
        """Deflate where a beta has vanished, tell the policy; where reads are not free the only host synchronisation.

        The steps after the first vanished beta are lost: they span an invariant subspace with rounding. The run continues with
        a random vector in the complement. Returns whether the recurrence is finite.
        """
        alphas, betas = self.host(self.alphas), self.host(self.betas)
        if not (alphas.isfinite() & betas.isfinite()).all():
            return False
        first = max(self._settled, self.kept)
        floor = NOISE * self.eps * self.scale()
        vanished = (betas[first:] <= floor).nonzero()  # kept vectors have none; the others were looked at before
        counted = first + int(vanished[0]) if len(vanished) else min(self.size, self.dimension - 1)
        recurrence = alphas[:counted], betas[:counted], self._losses()[:counted]
        lost = self.policy.observe(*recurrence, asymmetry=self._largest_asymmetry(counted))
        if lost is not None:
            self._go_back(lost, floor)
        elif len(vanished):
            self._deflate(counted)
        self.asymmetry = self._largest_asymmetry(self.size)  # steps that were given up say nothing
        self._settled = self.size
        return True

    def host(self, values: Tensor) -> Tensor:
        """The first `size` of them on the CPU."""
        found: Tensor = values[: self.size].cpu()
        return found

    def scale(self) -> float:
        """A size of the operator, from below."""
        values = [self.host(self.alphas).abs().max().item(), self.host(self.betas).max().item()]
        return float(max([*values, *self.spokes.abs().tolist()]))

    def projected(self) -> Tensor:
        """H (m, m) float64 on the CPU."""
        m, kept = self.size, self.kept
        betas = self.host(self.betas)
        H = torch.diag(self.host(self.alphas))
        inner = torch.arange(kept, max(kept, m - 1))
        H[inner, inner + 1] = H[inner + 1, inner] = betas[kept:-1]
        H[:kept, :kept] = self._core
        if 0 < kept < m:
            H[:kept, kept] = H[kept, :kept] = self.spokes.cpu()
            measured = self.corrections[: self._locked, kept:m].cpu()
            H[: self._locked, kept:] += measured
            H[kept:, : self._locked] += measured.T
        return H

    def taken(self) -> Tensor | None:
        """C (m, m) on the CPU in `A Q = Q (H + C) + beta q e'`: what passes at some steps only took away.

        None where every step has a pass, and C is rounding.
        """
        if isinstance(self.policy, Full):
            return None
        found: Tensor = self.corrections[: self.size, : self.size].cpu().clone()
        found[: self._locked, self.kept :] = 0.0  # is in H
        return found

    def cut(self, coordinates: Tensor) -> Tensor:
        """(k,) what new segments cut off of `A Q s`, as norms, for the columns s of `coordinates` (m, k)."""
        found: Tensor = (self._inherited[:, None] * coordinates[: len(self._inherited)]).norm(dim=0)
        return found

    def last_beta(self) -> float:
        """The coupling of `basis[size]`; zero where there is nothing left."""
        return 0.0 if self.exhausted else float(self.betas[self.size - 1])

    def vectors(self, coordinates: Tensor) -> Tensor:
        """(P, k) from coordinates (m, k) in the basis; every column in one piece, which took a third of the time."""
        weights = coordinates.T.to(self.basis)
        found: Tensor = (weights @ self.basis[: weights.shape[1]]).T
        return found

    def restart(self, coordinates: Tensor, *, locked: int) -> None:
        """Keep `Q coordinates` (m, l), orthonormal; the vector after the basis stays the next one.

        Args:
            coordinates: the last coordinate of the first `locked` of them is zero.
            locked: how many, from the first, belong to segments before the current one.
        """
        following = self.basis[self.size].clone()
        spokes = self.last_beta() * coordinates[-1]
        self._keep(coordinates, spokes, locked, core=coordinates.T @ self.projected() @ coordinates)
        self.start = locked
        self.basis[self.size] = following

    def begin_segment(self, coordinates: Tensor, values: Tensor, residuals: Tensor) -> None:
        """Keep the Ritz vectors `Q coordinates` (m, l) of `values` (l,) and go on with a random vector in their complement.

        Args:
            coordinates: of the vectors; eigenvectors of `H + C`, so that H says nothing about them.
            values: their Ritz values.
            residuals: (l,) norms of what is cut off.
        """
        self._keep(coordinates, torch.zeros_like(residuals), len(residuals), core=torch.diag(values))
        self._inherited = residuals
        self.start = self.size
        self.place_random(self.size)

    def place_random(self, index: int) -> None:
        """A random unit vector orthogonal to the first `index` basis vectors, in place `index`."""
        if index >= self.dimension:
            self.basis[index].zero_()
            return
        q = torch.randn(self.basis.shape[1], generator=self._generator, dtype=self.basis.dtype).to(self.basis.device)
        for _ in range(3 if index else 0):
            q /= self.products.norm(q)
            subtract_combination(q, self.basis[:index], self.products.coefficients(self.basis[:index], q))
        self.basis[index] = q / self.products.norm(q)
        self.policy.reset(index)

    def _keep(self, coordinates: Tensor, spokes: Tensor, locked: int, *, core: Tensor) -> None:
        m, kept = coordinates.shape
        self._core = core
        cut = coordinates[: len(self._inherited)] * self._inherited[:, None]
        self._inherited = cut.norm(dim=0)
        weights = coordinates.T.to(self.basis)
        for part in torch.split(self.basis, _RESTART_COLUMNS, dim=1):
            part[:kept] = weights @ part[:m]
        for recurrence in (self.alphas, self.betas, self.asymmetries, self.corrections):
            recurrence.zero_()
        self.alphas[:kept] = self._core.diagonal().to(self.alphas)
        self.spokes = spokes.to(self.alphas)
        self._locked = locked
        self.size = self._settled = kept

    def _largest_asymmetry(self, steps: int) -> float:
        return float(max([self.asymmetry, *self.host(self.asymmetries)[:steps].abs().tolist()]))

    def _losses(self) -> Tensor:
        """(m,) on the CPU: largest inner product with a vector before it that the passes took from the one after each.

        Not with locked ones: what their residuals lead back to them is no loss of orthogonality.
        """
        taken = self.corrections[self._locked :, : self.size].abs().amax(0).cpu()
        return taken / self.host(self.betas).clamp_min(torch.finfo(torch.float64).tiny)

    def _deflate(self, j: int) -> None:
        self._give_up(j + 1)
        self.start = j + 1
        self.betas[j] = 0.0
        self.place_random(j + 1)

    def _go_back(self, place: int, floor: float) -> None:
        """Give up the steps from the vector at `place` on, and make it orthogonal to those before."""
        self._give_up(place)
        w = self.basis[place]
        for _ in range(2):
            self._pass(w, slice(0, place), column=place - 1, scale=self.betas[place - 1])
        length = self.products.norm(w)
        self.betas[place - 1] *= length
        if self.betas[place - 1] <= floor:
            self._deflate(place - 1)
            return
        w /= length.to(w.dtype)
        self.policy.reset(place)

    def _give_up(self, size: int) -> None:
        """The steps after the first `size`; what their passes took away would be added to that of their repetitions."""
        self.size = size
        self.corrections[:, size:] = 0.0

    def _orthogonalised(self, w: Tensor, count: int) -> Tensor:
        """The norm of `w` after the passes the policy asks for; what they took away is kept as a column of `corrections`."""
        rows = self.policy.rows(count)
        if self.policy.orthonormal and count == self.dimension:
            rows = slice(0, count)  # all that is left lies in their span
        elif rows is None and self._locked:
            rows = slice(0, self._locked)  # their residuals lead back to them
        if rows is None:
            return self.products.norm(w)
        before = self.products.norm(w)
        self._pass(w, rows)
        after = self.products.norm(w)
        if not self.products.reads_are_free or after < _SECOND_PASS * before:
            self._pass(w, rows)
            after = self.products.norm(w)
        self.num_passes += rows == slice(0, count)
        return after

    def _pass(self, w: Tensor, rows: slice, *, column: int | None = None, scale: Tensor | float = 1.0) -> None:
        basis = self.basis[rows]
        found = self.products.coefficients(basis, w)
        subtract_combination(w, basis, found)
        self.corrections[rows, self.size if column is None else column] += found * scale
