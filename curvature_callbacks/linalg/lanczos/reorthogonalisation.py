"""Reorthogonalisation: which basis vectors the next one is orthogonalised against, beyond the three-term recurrence."""

from typing import Final, Protocol, final

import torch
from torch import Tensor

_BASE: Final = 2.0  # orthogonality of neighbours after the three-term step, in units of eps: their products are float64 sums
_CAUTION: Final = 2.0  # the estimate is a size, not a bound; true inner products were 0.1 to 1 times it


class Reorthogonalisation(Protocol):
    """A policy; asked before every step, told the recurrence whenever the run looks at it."""

    @property
    def orthonormal(self) -> bool:
        """Whether the basis stays orthonormal, at least to `sqrt(eps)`."""
        ...

    def rows(self, size: int) -> slice | None:
        """Basis vectors among the first `size` that the vector after them is orthogonalised against; None: none."""
        ...

    def observe(self, alphas: Tensor, betas: Tensor, losses: Tensor, *, asymmetry: float) -> int | None:
        """Told the recurrence so far: the first vector that is not orthogonal, if any; the run goes back to it.

        Args:
            alphas: (m,) float64 on the CPU.
            betas: (m,), likewise.
            losses: (m,), likewise: largest inner product with an earlier vector that a pass took from the vector after each.
            asymmetry: largest `|<q_{j-1}, A q_j> - beta_{j-1}|` so far.
        """
        ...

    def reset(self, size: int) -> None:
        """The vector at place `size` was made orthogonal to all before it; what was estimated for it is void."""
        ...


@final
class Full:
    """Against the whole basis at every step."""

    orthonormal: Final = True

    def rows(self, size: int) -> slice | None:
        """All."""
        return slice(0, size)

    def observe(self, alphas: Tensor, betas: Tensor, losses: Tensor, *, asymmetry: float) -> int | None:
        """Nothing depends on it."""
        return None

    def reset(self, size: int) -> None:
        """Nothing was estimated."""


@final
class Off:
    """The three-term recurrence alone: copies of converged pairs come back as ghosts."""

    orthonormal: Final = False

    def rows(self, size: int) -> slice | None:
        """None."""
        return None

    def observe(self, alphas: Tensor, betas: Tensor, losses: Tensor, *, asymmetry: float) -> int | None:
        """Nothing depends on it."""
        return None

    def reset(self, size: int) -> None:
        """Nothing was estimated."""


@final
class Selective:
    """Against the latest `window` vectors at every step, and against all at two steps running out of every `period`.

    Two, because the recurrence carries what one vector has lost on to the next but one. Where a pass finds more than
    `sqrt(eps)` lost, the period is too long: passes against a basis that is not orthogonal blow the recurrence up (in float32
    after 50 steps, eigenvalues 90 * 0.6^i, period 5). So the run goes back to the last two that were against all, and the
    period is shorter by one from then on; at 2 every step is against all.

    Args:
        eps: of the basis's dtype.
        window: vectors.
        period: steps.
    """

    orthonormal: Final = False

    def __init__(self, *, eps: float, window: int, period: int) -> None:
        self._lost = eps**0.5
        self._window = window
        self._period = period
        self._size = 0  # steps that were counted
        self._orthogonal = 0  # the latest vector that was made orthogonal to all before it

    def rows(self, size: int) -> slice | None:
        """The window, or all."""
        return slice(0 if self._against_all(size) else max(0, size - self._window), size)

    def observe(self, alphas: Tensor, betas: Tensor, losses: Tensor, *, asymmetry: float) -> int | None:
        """Shorten the period where too much was lost, and go back to the first vector that was not against all."""
        lost = (losses[self._size :] > self._lost).nonzero()
        if len(lost) == 0 or self._period <= 2:
            self._size = len(losses)
            return None
        place = self._size + int(lost[0]) + 1
        while place > self._orthogonal + 1 and not self._against_all(place - 1):
            place -= 1
        self._period -= 1
        return place

    def reset(self, size: int) -> None:
        """What was lost before does not count again."""
        self._size = self._orthogonal = size

    def _against_all(self, size: int) -> bool:
        return size % self._period in (0, 1)


@final
class Partial:
    """Against the whole basis just before orthogonality would be lost to `sqrt(eps)`, by the recurrence of its estimate.

    With `w_ji` the inner product of basis vectors j and i (Simon 1984, equation 2.4),
    `b_j w_{j+1,i} = b_i w_{j,i+1} + (a_i - a_j) w_ji + b_{i-1} w_{j,i-1} - b_{j-1} w_{j-1,i}`, plus the error of the products:
    rounding of size eps, or the asymmetry measured where that is larger (models that compute parts in less precision). It
    needs alphas and betas on the host, which are there when it is told of them only: after every step on a CPU, at every look
    elsewhere. It is carried on over the steps done since, and forecast over those until it is told again with the latest
    recurrence repeated: if that reaches `sqrt(eps)`, the next two vectors are orthogonalised against all before, and if it
    would again after these, all of them until then. What a forecast cannot see (a beta that all but vanishes) is lost work:
    the run goes back to that step. Every pass shows what had really been lost: where that is more than was estimated, the
    error of the products is taken to be larger in proportion, and where the vector before the pass had gone too far by that,
    the run goes back to the last one that was orthogonalised against all.

    References: Simon, "The Lanczos algorithm with partial reorthogonalization" (1984).

    Args:
        eps: of the basis's dtype.
        ahead: steps until it is told again.
    """

    orthonormal: Final = True
    _size: int  # steps that were counted
    _orthogonal: int  # the latest vector that was orthogonalised against all
    _until: int  # the last one that will be, by the plan
    _before: Tensor  # (j - 1,) w_{j-1,i} for i < j - 1
    _latest: Tensor  # (j,) w_ji for i < j

    def __init__(self, *, eps: float, ahead: int) -> None:
        self._lost = eps**0.5
        self._limit = eps**0.5 / _CAUTION
        self._base = _BASE * eps
        self._noise = 0.0  # of a product with a unit vector, along another one
        self._excess = 1.0  # of what passes found over what was estimated
        self._ahead = ahead
        self.reset(0)

    def rows(self, size: int) -> slice | None:
        """All where the plan says so."""
        return slice(0, size) if size <= self._until else None

    def observe(self, alphas: Tensor, betas: Tensor, losses: Tensor, *, asymmetry: float) -> int | None:
        """Carry the estimate on, and plan the steps until the next look unless a vector has been lost."""
        m = len(alphas)
        self._noise = max(self._noise, _CAUTION * asymmetry)
        while self._size < m:
            purged = self._size + 1 <= self._until
            earlier = self._largest()
            ratio = losses[self._size].item() / max(self._advance(alphas, betas, self._size, purged=purged), self._base)
            self._size += 1
            if purged and ratio > 1:
                self._excess *= ratio
                if earlier * ratio > self._lost:
                    return self._orthogonal + 1
            if self._largest() > self._lost:
                return self._size
            if purged:
                self._orthogonal = self._size
        if m == 0:
            return None
        planned = max(0, self._until - m)
        for count in (planned, max(planned, 2), max(planned, self._ahead)):
            self._until = m + count
            if self._forecast(alphas, betas, count) < self._limit:
                break
        return None

    def reset(self, size: int) -> None:
        """Begin anew with the vector at place `size`; the two after it are orthogonalised against all as well."""
        self._size = self._orthogonal = size
        self._until = size + 2 if size else 0
        self._before = torch.full((max(0, size - 1),), self._lost, dtype=torch.float64)  # at most
        self._latest = torch.full((size,), self._base, dtype=torch.float64)

    def _largest(self) -> float:
        return self._latest.abs().max().item() if len(self._latest) else 0.0

    def _advance(self, alphas: Tensor, betas: Tensor, j: int, *, purged: bool) -> float:
        """From the estimates of vectors j - 1 and j to those of j and j + 1; the largest of the latter before any pass."""
        following = torch.full((j + 1,), self._base, dtype=torch.float64)
        if j > 0:
            beta = betas[j].clamp_min(torch.finfo(torch.float64).tiny)
            own = torch.cat([self._latest, torch.ones(1, dtype=torch.float64)])  # w_jj = 1
            past = torch.cat([self._before, torch.ones(1, dtype=torch.float64)])  # w_{j-1,j-1} = 1
            terms = betas[:j] * own[1:] + (alphas[:j] - alphas[j]) * own[:j] - betas[j - 1] * past
            terms[1:] += betas[: j - 1] * own[: j - 1]
            scale = max(alphas[: j + 1].abs().max().item(), betas[: j + 1].max().item())
            noise = max(self._noise, self._excess * self._base * scale)  # not Simon's b_i + b_j: a product rounds by its norm
            following[:j] = ((terms + noise * terms.sign()) / beta).clamp(-1.0, 1.0)  # signed: else the terms cancel wrongly
        largest = following.abs().max().item()
        self._before, self._latest = self._latest, following.fill_(self._base) if purged else following
        return largest

    def _forecast(self, alphas: Tensor, betas: Tensor, purged: int) -> float:
        """Largest estimate over the steps ahead, of which the first `purged` are orthogonalised against all."""
        saved = self._before, self._latest
        worst = 0.0
        m = len(alphas)
        alphas = torch.cat([alphas, alphas[-1:].expand(self._ahead)])
        betas = torch.cat([betas, betas[-1:].expand(self._ahead)])
        for step in range(self._ahead):
            self._advance(alphas, betas, m + step, purged=step < purged)
            worst = max(worst, self._largest())
        self._before, self._latest = saved
        return worst
