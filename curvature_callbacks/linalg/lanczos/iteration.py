"""Iteration: steps, looks, restarts and new segments of a Krylov basis until the wanted pairs are there."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, final

import torch
from torch import Tensor

from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.options import ReorthMode
from curvature_callbacks.linalg.lanczos.ritz import Ritz, distinct_pairs, ritz_pairs
from curvature_callbacks.linalg.lanczos.wanted import Wanted

_NEARLY: Final = ((2.0, 1), (50.0, 2))  # times too large a residual, and steps until the next look
_KEPT_SHARE: Final = 0.5  # of the room beyond the wanted pairs that a restart fills with the next best ones

_Verdict = Literal["unfinished", "copies may be missing", "complete"]


@final
@dataclass(slots=True, kw_only=True)
class Iteration:
    """What one run does and where it stands.

    Attributes:
        krylov: the basis, before its first step.
        mode: of reorthogonalisation.
        wanted: pairs, at most as many as the dimension.
        tol: relative tolerance of their residuals.
        max_matvecs: products to stop at.
        deadline: value of `time.perf_counter()` to stop at.
        sweeping: whether to look for further copies of what has converged, in the complement.
        hurried: whether to look at every one of the first steps: a warm run for one pair takes 4 or 5.
        look_every: most steps between looks at the pairs; where reads are not free the only host synchronisations.
    """

    krylov: Krylov
    mode: ReorthMode
    wanted: Wanted
    tol: float
    max_matvecs: int
    deadline: float | None
    sweeping: bool
    hurried: bool
    look_every: int
    # First vector of the segment of the latest steps, also where a vanished beta has closed that since.
    _segment: int = field(init=False, default=0)
    _patience: int = field(init=False)  # most steps until the next look
    _ahead: int = field(init=False)  # steps until the next look

    def __post_init__(self) -> None:
        self._ahead = self._patience = self.look_every

    def result(self) -> Ritz:
        """The pairs when all have converged and nothing is left to look for, or the budget is spent.

        Raises:
            ProbeError: a product is not finite.
        """
        return deque(self.looks(), maxlen=1).pop()

    def looks(self) -> Iterator[Ritz]:
        """The pairs at every look; the last are the result."""
        krylov = self.krylov
        while True:
            self._segment = krylov.start
            self._advance()
            over = krylov.exhausted or self._spent()
            if krylov.start != self._segment:
                self.sweeping = True  # an invariant subspace shows one copy of each eigenvalue
                self._patience = 1  # steps after a vanished beta are lost, so look at each from here on
            over = over or (krylov.finished and not krylov.policy.orthonormal)
            ritz = self._pairs(final=over)
            yield ritz
            verdict: _Verdict = "complete" if over else self._verdict(ritz)
            if verdict == "complete":
                return
            if verdict == "copies may be missing":
                self._search_complement(ritz)
            self._ahead = min(self._patience, self._steps_to(ritz))
            if krylov.finished:
                self._restart()

    def _advance(self) -> None:
        """Make steps until the next look at the pairs, or until a segment has closed.

        Behind every step that is judged where reads are free: no step after a vanished beta is then lost, and no vector is
        orthogonalised in vain.
        """
        krylov = self.krylov
        room = min(krylov.capacity - krylov.size, self.max_matvecs - krylov.num_matvecs)
        ahead = max(1, min(1 if self.hurried and krylov.size < 2 * self.look_every else self._ahead, room))
        at_once = 1 if krylov.products.reads_are_free else ahead
        while ahead > 0 and krylov.start == self._segment:
            for _ in range(at_once):
                krylov.step()
            ahead -= at_once
            krylov.settle()

    def _steps_to(self, ritz: Ritz) -> int:
        """Steps to the next look: few where the worst of several residuals is nearly there, as they fall ever faster.

        With looks every five steps ten pairs of a GGN took 30 products where 27 were enough. One pair alone has converged after
        a look or two.
        """
        if len(ritz.values) < self.wanted.count or self.wanted.count == 1:
            return self.look_every
        worst = float((ritz.residuals / (self.tol * ritz.values.abs()).clamp_min(ritz.floor)).max())
        return next((steps for factor, steps in _NEARLY if worst < factor), self.look_every)

    def _spent(self) -> bool:
        """Whether the products or the time are, on any process."""
        late = self.deadline is not None and self.krylov.products.anywhere(time.perf_counter() >= self.deadline)
        return late or self.krylov.num_matvecs >= self.max_matvecs

    def _pairs(self, *, final: bool) -> Ritz:
        """The wanted pairs of the basis as it stands; `final`: also where they have not converged."""
        if self.krylov.policy.orthonormal:
            return ritz_pairs(self.krylov, self.wanted)
        return distinct_pairs(self.krylov, self.wanted, self.tol, final=final)

    def _verdict(self, ritz: Ritz) -> _Verdict:
        """Whether all pairs have converged, and whether the converged segments may lack copies of them."""
        krylov = self.krylov
        enough = len(ritz.values) == self.wanted.count and krylov.size > max(self.wanted.count, self._segment)
        searching = self.sweeping and krylov.policy.orthonormal
        tol = self.tol / 2 if searching and self._segment == 0 else self.tol  # residuals grow a little when others are found
        if not enough or not ritz.converged(tol).all():
            return "unfinished"
        if not searching:
            return "complete"
        if self._segment == 0 or self._segment_contributes(ritz.floor):
            return "copies may be missing"
        return "complete" if self._segment_has_settled(ritz.floor) else "unfinished"

    def _search_complement(self, ritz: Ritz) -> None:
        """Lock the pairs and go on with a random vector in their complement, where further copies would be."""
        residuals = torch.where(ritz.residuals > ritz.floor, ritz.residuals, 0.0)  # the floor is added to none
        self.krylov.begin_segment(ritz.coordinates, ritz.values, residuals)

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
        """Whether the segment's outermost values at the wanted ends have converged: then it holds nothing further out."""
        _, values, vectors = self._split()
        errors = self.krylov.last_beta() * vectors[-1].abs()
        settled = errors <= (self.tol * values.abs()).clamp_min(floor)
        if self.wanted.by_magnitude:
            return bool(settled[values.abs().argmax()])
        upper = self.wanted.upper == 0 or bool(settled[-1])
        return upper and (self.wanted.lower == 0 or bool(settled[0]))

    def _split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values before the current segment; Ritz values and vectors of the segment by itself."""
        start, H = self._segment, self.krylov.projection.matrix()
        values, vectors = torch.linalg.eigh(H[start:, start:])
        return torch.linalg.eigvalsh(H[:start, :start]), values, vectors

    def _restart(self) -> None:
        """Compress the full basis to the wanted pairs of earlier segments and the best of the current one."""
        krylov = self.krylov
        start, H = krylov.start, krylov.projection.matrix()
        earlier_values, earlier = torch.linalg.eigh(H[:start, :start])
        values, current = torch.linalg.eigh(H[start:, start:])
        locked = earlier[:, self.wanted.choose(earlier_values)]
        room = krylov.capacity - locked.shape[1]
        extra = int(_KEPT_SHARE * max(0, room - self.wanted.count))
        kept = current[:, self.wanted.more(extra).at_most(min(room - 1, len(values))).choose(values)]
        coordinates: Tensor = torch.block_diag(locked, kept)  # type: ignore[no-untyped-call]
        krylov.restart(coordinates, locked=locked.shape[1])
