"""Iteration: steps, looks, restarts and new segments of a Krylov basis until the wanted pairs are there."""

import time
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.errors import ProbeError
from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.ritz import Ritz, distinct_pairs, ritz_pairs
from curvature_callbacks.linalg.lanczos.wanted import Wanted

LOOK_EVERY: Final = 5  # most steps between looks at the pairs; where reads are not free the only host synchronisations
_NEARLY: Final = ((2.0, 1), (50.0, 2))  # times too large a residual, and steps until the next look
_KEPT_SHARE: Final = 0.5  # of the room beyond the wanted pairs that a restart fills with the next best ones


@final
@dataclass(slots=True)
class Iteration:
    """What one run does and where it stands.

    Attributes:
        krylov: the basis, before its first step.
        wanted: pairs, at most as many as the dimension.
        tol: relative tolerance of their residuals.
        max_matvecs: products to stop at.
        deadline: value of `time.perf_counter()` to stop at.
        sweeping: whether to look for further copies of what has converged, in the complement.
        hurried: whether to look at every one of the first steps: a warm run for one pair takes 4 or 5.
        patience: most steps until the next look.
        segment: first vector of the segment of the latest steps; one that a vanished beta has closed is judged by itself.
    """

    krylov: Krylov
    wanted: Wanted
    tol: float
    max_matvecs: int
    deadline: float | None
    sweeping: bool
    hurried: bool
    patience: int
    segment: int = 0
    _ahead: int = field(init=False)

    def __post_init__(self) -> None:
        self._ahead = self.patience

    def result(self) -> Ritz:
        """The pairs when all have converged and nothing is left to look for, or the budget is spent.

        Raises:
            ProbeError: a product is not finite.
        """
        krylov = self.krylov
        while True:
            self.segment = krylov.start
            self._advance()
            over = krylov.exhausted or self._spent()
            if krylov.start != self.segment:
                self.sweeping = True  # an invariant subspace shows one copy of each eigenvalue
                self.patience = 1  # steps after a vanished beta are lost, so look at each from here on
            over = over or (krylov.finished and not krylov.policy.orthonormal)
            ritz = self._pairs(final=over)
            if over or self._complete(ritz):
                return ritz
            self._ahead = min(self.patience, self._steps_to(ritz))
            if krylov.finished:
                self._restart()

    def _advance(self) -> None:
        """Steps until the next look at the pairs, or until a segment has closed.

        At the recurrence it looks behind every step where that is free: no step after a vanished beta is then lost, and no
        vector is orthogonalised in vain.
        """
        krylov = self.krylov
        room = min(krylov.capacity - krylov.size, self.max_matvecs - krylov.num_matvecs)
        ahead = max(1, min(1 if self.hurried and krylov.size < 2 * LOOK_EVERY else self._ahead, room))
        at_once = 1 if krylov.products.reads_are_free else ahead
        while ahead > 0 and krylov.start == self.segment:
            for _ in range(at_once):
                krylov.step()
            ahead -= at_once
            if not krylov.look():
                raise ProbeError("the operator's products are not finite: there are no eigenpairs.")

    def _steps_to(self, ritz: Ritz) -> int:
        """Steps to the next look: few where the worst of several residuals is nearly there, as they fall ever faster.

        With looks every five steps ten pairs of a GGN took 30 products where 27 were enough. One pair alone has converged after
        a look or two.
        """
        if len(ritz.values) < self.wanted.count or self.wanted.count == 1:
            return LOOK_EVERY
        worst = float((ritz.residuals / (self.tol * ritz.values.abs()).clamp_min(ritz.floor)).max())
        return next((steps for factor, steps in _NEARLY if worst < factor), LOOK_EVERY)

    def _spent(self) -> bool:
        late = self.deadline is not None and self.krylov.products.anywhere(time.perf_counter() >= self.deadline)
        return late or self.krylov.num_matvecs >= self.max_matvecs

    def _pairs(self, *, final: bool) -> Ritz:
        if self.krylov.policy.orthonormal:
            return ritz_pairs(self.krylov, self.wanted)
        return distinct_pairs(self.krylov, self.wanted, self.tol, final=final)

    def _complete(self, ritz: Ritz) -> bool:
        """Whether nothing is left to do; where a converged segment may hide copies, another is begun."""
        krylov = self.krylov
        enough = len(ritz.values) == self.wanted.count and krylov.size > max(self.wanted.count, self.segment)
        more = self.sweeping and krylov.policy.orthonormal
        tol = self.tol / 2 if more and self.segment == 0 else self.tol  # residuals grow a little when others are found
        if not enough or not ritz.converged(tol).all():
            return False
        if not more:
            return True
        if self.segment == 0 or self._segment_contributes(ritz.floor):
            known = torch.where(ritz.residuals > ritz.floor, ritz.residuals, 0.0)  # the floor is added to none
            krylov.begin_segment(ritz.coordinates, ritz.values, known)
            return False
        return self._segment_has_settled(ritz.floor)

    def _segment_contributes(self, floor: float) -> bool:
        """Whether the current segment holds a wanted value that those before do not."""
        before, values, _ = self._split()
        if len(before) < self.wanted.count:
            return True
        least = before[self.wanted.choose(before)]  # descending
        if self.wanted.by_magnitude:
            return bool(values.abs().max() > least.abs().min() + floor)
        upper, lower = self.wanted.upper, self.wanted.lower
        above = upper > 0 and bool(values[-1] > least[upper - 1] + floor)
        below = lower > 0 and bool(values[0] < least[-lower] - floor)
        return above or below

    def _segment_has_settled(self, floor: float) -> bool:
        """Whether its outermost values at the wanted ends have converged: then it holds nothing further out."""
        _, values, vectors = self._split()
        errors = self.krylov.last_beta() * vectors[-1].abs()
        settled = errors <= (self.tol * values.abs()).clamp_min(floor)
        if self.wanted.by_magnitude:
            return bool(settled[values.abs().argmax()])
        upper = self.wanted.upper == 0 or bool(settled[-1])
        return upper and (self.wanted.lower == 0 or bool(settled[0]))

    def _split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values before the current segment; Ritz values and vectors of the segment by itself."""
        start, H = self.segment, self.krylov.projected()
        values, vectors = torch.linalg.eigh(H[start:, start:])
        return torch.linalg.eigvalsh(H[:start, :start]), values, vectors

    def _restart(self) -> None:
        """Compress the full basis to the wanted pairs of earlier segments and the best of the current one."""
        krylov = self.krylov
        start, H = krylov.start, krylov.projected()
        before, first = torch.linalg.eigh(H[:start, :start])
        values, second = torch.linalg.eigh(H[start:, start:])
        locked = first[:, self.wanted.choose(before)]
        room = krylov.capacity - locked.shape[1]
        extra = int(_KEPT_SHARE * max(0, room - self.wanted.count))
        kept = second[:, self.wanted.more(extra).at_most(min(room - 1, len(values))).choose(values)]
        krylov.restart(_side_by_side(locked, kept), locked=locked.shape[1])


def _side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """The block-diagonal matrix of the two."""
    joined = first.new_zeros(first.shape[0] + second.shape[0], first.shape[1] + second.shape[1])
    joined[: first.shape[0], : first.shape[1]] = first
    joined[first.shape[0] :, first.shape[1] :] = second
    return joined
