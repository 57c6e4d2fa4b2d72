"""Projection: the numbers of a Krylov basis, from which the matrix H is put together; `krylov` has a picture of it."""

from typing import final

import torch
from torch import Tensor

from curvature_callbacks.linalg.lanczos.reorthogonalisation import Recurrence


@final
class Projection:
    """H and C of `A Q = Q (H + C) + beta q e'`. Steps fill it on the operator's device; what a restart leaves is on the CPU.

    Args:
        capacity: most basis vectors.
        device: of the operator.

    Attributes:
        size: m, steps done; the entries after them mean nothing.
        alphas: (capacity,) float64 diagonal of H.
        betas: (capacity,) couplings of each vector to the next one.
        asymmetries: (capacity,) `<q_{j-1}, A q_j> - beta_{j-1}`: what a symmetric operator leaves to rounding.
        corrections: (capacity, capacity) column j: components along earlier vectors that passes took from the product of
            vector j.
        spokes: (kept,) couplings of the kept vectors to the one after them; zero for locked ones.
        locked: how many of the kept vectors, from the first, belong to earlier segments.
        asymmetry: largest `|asymmetries|` so far, restarts included.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.alphas, self.betas, self.asymmetries = torch.zeros(3, capacity, dtype=torch.float64, device=device).unbind()
        self.corrections = torch.zeros(capacity, capacity, dtype=torch.float64, device=device)
        self.spokes = self.alphas.new_zeros(0)
        self.locked = 0
        self.size = 0
        self.asymmetry = 0.0
        self._core = torch.zeros(0, 0, dtype=torch.float64)  # (kept, kept) on the CPU
        self._residuals = torch.zeros(0, dtype=torch.float64)  # (l,) of the first kept: norms of what no entry of H or C holds

    @property
    def kept(self) -> int:
        """Vectors carried over from before the last restart."""
        return len(self.spokes)

    def matrix(self) -> Tensor:
        """H (m, m) float64 on the CPU."""
        m, kept, locked = self.size, self.kept, self.locked
        betas = self._on_host(self.betas)
        H = torch.diag(self._on_host(self.alphas))
        inner = torch.arange(kept, max(kept, m - 1))
        H[inner, inner + 1] = H[inner + 1, inner] = betas[kept:-1]
        H[:kept, :kept] = self._core
        if 0 < kept < m:
            H[:kept, kept] = H[kept, :kept] = self.spokes.cpu()
            measured = self.corrections[:locked, kept:m].cpu()
            H[:locked, kept:] += measured
            H[kept:, :locked] += measured.T
        return H

    def removed(self) -> Tensor:
        """C (m, m) float64 on the CPU: what passes took away and H does not hold."""
        removed: Tensor = self.corrections[: self.size, : self.size].cpu().clone()
        removed[: self.locked, self.kept :] = 0.0  # is in H
        return removed

    def cut_off(self, coordinates: Tensor) -> Tensor:
        """(k,) norms of what new segments cut off of `A Q s`, for the columns s of `coordinates` (m, k)."""
        norms: Tensor = (self._residuals[:, None] * coordinates[: len(self._residuals)]).norm(dim=0)
        return norms

    def keep(self, coordinates: Tensor, spokes: Tensor, *, core: Tensor, locked: int) -> None:
        """Begin anew with `core` (kept, kept) as H, in the coordinates of the kept vectors `Q coordinates` (m, kept)."""
        self._residuals = self.cut_off(coordinates)
        self._core = core
        for values in (self.alphas, self.betas, self.asymmetries, self.corrections):
            values.zero_()
        self.size = len(core)
        self.alphas[: self.size] = core.diagonal().to(self.alphas)
        self.spokes = spokes.to(self.alphas)
        self.locked = locked

    def cut(self, residuals: Tensor) -> None:
        """The kept vectors are no longer coupled to what comes after: these (kept,) norms are all that is known of it."""
        self._residuals = residuals

    def discard(self, size: int) -> None:
        """Drop the steps after `size`, and their corrections, which repeated steps would otherwise add to."""
        self.size = size
        self.corrections[:, size:] = 0.0

    def is_finite(self) -> bool:
        """Whether the recurrence holds no NaN and no infinity."""
        return bool((self.alphas[: self.size].isfinite() & self.betas[: self.size].isfinite()).all())

    def scale(self) -> float:
        """A size of the operator, from below."""
        largest = [self._on_host(self.alphas).abs().max().item(), self._on_host(self.betas).max().item()]
        return float(max([*largest, *self.spokes.abs().tolist()]))

    def first_vanished(self, start: int, floor: float) -> int | None:
        """The first step from `start` on whose beta is at most `floor`; None where all are larger."""
        vanished = (self._on_host(self.betas)[start:] <= floor).nonzero()
        return start + int(vanished[0]) if len(vanished) else None

    def recurrence(self, steps: int) -> Recurrence:
        """The first `steps` for a policy to judge."""
        alphas, betas = self._on_host(self.alphas), self._on_host(self.betas)
        # Not with locked vectors: what their residuals lead back to them is no loss of orthogonality.
        removed = self.corrections[self.locked :, : self.size].abs().amax(0).cpu()
        losses = removed / betas.clamp_min(torch.finfo(torch.float64).tiny)
        return Recurrence(alphas[:steps], betas[:steps], losses[:steps], self.largest_asymmetry(steps))

    def largest_asymmetry(self, steps: int) -> float:
        """Over the first `steps` and all before the last restart."""
        return float(max([self.asymmetry, *self._on_host(self.asymmetries)[:steps].abs().tolist()]))

    def _on_host(self, values: Tensor) -> Tensor:
        """The first m of `values`, on the CPU."""
        ours: Tensor = values[: self.size].cpu()
        return ours
