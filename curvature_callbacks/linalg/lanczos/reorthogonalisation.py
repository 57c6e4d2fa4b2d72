"""Reorthogonalisation: which basis vectors the next one is orthogonalised against, beyond the three-term recurrence."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor
from typing_extensions import override

_BASE: Final = 2.0  # orthogonality of neighbours after the three-term step, in units of eps: their products are float64 sums
_CAUTION: Final = 2.0  # the estimate is a size, not a bound; true inner products were 0.1 to 1 times it


@final
@dataclass(frozen=True, slots=True, eq=False)
class Recurrence:
    """The first m steps of a run, on the CPU.

    Attributes:
        alphas: (m,) float64.
        betas: (m,) float64.
        losses: (m,) float64: largest inner product with an earlier vector that a pass took from the vector after each.
        asymmetry: largest `|<q_{j-1}, A q_j> - beta_{j-1}|` so far.
    """

    alphas: Tensor
    betas: Tensor
    losses: Tensor
    asymmetry: float

    def __len__(self) -> int:
        return len(self.alphas)


class Reorthogonalisation(ABC):
    """A policy: asked before every step which vectors to pass over, told the recurrence at every look.

    Attributes:
        orthonormal: whether the basis stays orthonormal, at least to `sqrt(eps)`.
        at_every_step: whether every vector is orthogonalised against all before it.
    """

    orthonormal: ClassVar[bool]
    at_every_step: ClassVar[bool] = False

    @abstractmethod
    def vectors(self, size: int) -> slice | None:
        """Basis vectors among the first `size` that the vector after them is orthogonalised against; None: none."""

    def observe(self, recurrence: Recurrence) -> int | None:
        """Learn from the recurrence so far; the first vector that is not orthogonal, if any: the run goes back to it."""
        return None

    def reset(self, size: int) -> None:  # noqa: B027
        """Forget estimates of the vector at index `size`: it was made orthogonal to all before it."""


@final
class Full(Reorthogonalisation):
    """Against the whole basis at every step."""

    orthonormal = True
    at_every_step = True

    @override
    def vectors(self, size: int) -> slice | None:
        return slice(0, size)


@final
class Off(Reorthogonalisation):
    """The three-term recurrence alone: copies of converged pairs come back as ghosts."""

    orthonormal = False

    @override
    def vectors(self, size: int) -> slice | None:
        return None


@final
class Selective(Reorthogonalisation):
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

    orthonormal = False

    def __init__(self, *, eps: float, window: int, period: int) -> None:
        self._lost = eps**0.5
        self._window = window
        self._period = period
        self._size = 0  # steps that were judged
        self._orthogonal = 0  # the latest vector that was made orthogonal to all before it

    @override
    def vectors(self, size: int) -> slice | None:
        return slice(0 if self._against_all(size) else max(0, size - self._window), size)

    @override
    def observe(self, recurrence: Recurrence) -> int | None:
        lost = (recurrence.losses[self._size :] > self._lost).nonzero()
        if len(lost) == 0 or self._period <= 2:
            self._size = len(recurrence)
            return None
        index = self._size + int(lost[0]) + 1
        while index > self._orthogonal + 1 and not self._against_all(index - 1):
            index -= 1
        self._period -= 1
        return index

    @override
    def reset(self, size: int) -> None:
        self._size = self._orthogonal = size

    def _against_all(self, size: int) -> bool:
        return size % self._period in (0, 1)


@final
class Partial(Reorthogonalisation):
    """Against the whole basis just before orthogonality would be lost to `sqrt(eps)`, by the recurrence of its estimate.

    With `w_ji` the inner product of basis vectors j and i (Simon 1984, equation 2.4),
    `b_j w_{j+1,i} = b_i w_{j,i+1} + (a_i - a_j) w_ji + b_{i-1} w_{j,i-1} - b_{j-1} w_{j-1,i}`, plus the error of the products:
    rounding of size eps, or the asymmetry measured where that is larger (models that compute parts in less precision).

    The estimate needs alphas and betas on the host, so it is carried on when the run looks at them: after every step on a CPU,
    every few steps elsewhere. Each time it is carried over the steps done since, and forecast over those until the next look,
    with the latest recurrence repeated. If the forecast reaches `sqrt(eps)`, the next two vectors are orthogonalised against
    all before, and if it would again after these, all of them until then.

    The run goes back where this was not enough. To the step where the estimate has passed `sqrt(eps)`, which a forecast cannot
    see if a beta all but vanishes. And to the last vector that was orthogonalised against all, where a pass found more than was
    estimated: the error of the products is then taken to be larger in proportion, and the vector before the pass may have gone
    too far by that.

    References: Simon, "The Lanczos algorithm with partial reorthogonalization" (1984).

    Args:
        eps: of the basis's dtype.
        ahead: steps between two looks.
    """

    orthonormal = True
    _size: int  # steps that the estimate was carried over
    _orthogonal: int  # the latest vector that was orthogonalised against all
    _until: int  # the last one that will be, by the plan
    _estimate: "_Estimate"

    def __init__(self, *, eps: float, ahead: int) -> None:
        self._lost = eps**0.5
        self._limit = eps**0.5 / _CAUTION
        self._base = _BASE * eps
        self._noise = 0.0  # of a product with a unit vector, along another one
        self._excess = 1.0  # of what passes found over what was estimated
        self._ahead = ahead
        self.reset(0)

    @property
    def estimate(self) -> float:
        """Estimated size of the largest inner product of the latest vector with an earlier one."""
        return self._estimate.largest

    @override
    def vectors(self, size: int) -> slice | None:
        return slice(0, size) if size <= self._until else None

    @override
    def observe(self, recurrence: Recurrence) -> int | None:
        self._noise = max(self._noise, _CAUTION * recurrence.asymmetry)
        while self._size < len(recurrence):
            lost = self._carry_on(recurrence)
            if lost is not None:
                return lost
        if len(recurrence) > 0:
            self._plan(recurrence)
        return None

    @override
    def reset(self, size: int) -> None:
        self._size = self._orthogonal = size
        self._until = size + 2 if size else 0  # the two after it as well
        before = torch.full((max(0, size - 1),), self._lost, dtype=torch.float64)  # at most
        self._estimate = _Estimate(before, torch.full((size,), self._base, dtype=torch.float64))

    def _carry_on(self, recurrence: Recurrence) -> int | None:
        """Carry the estimate over one more step; the vector to go back to, if one has been lost."""
        j = self._size
        passed = j + 1 <= self._until
        earlier = self._estimate.largest
        following = self._following(self._estimate, recurrence.alphas, recurrence.betas, j)
        ratio = recurrence.losses[j].item() / max(following.abs().max().item(), self._base)
        self._estimate = self._estimate.then(self._after_pass(following) if passed else following)
        self._size = j + 1
        if passed and ratio > 1:
            self._excess *= ratio
            if earlier * ratio > self._lost:
                return self._orthogonal + 1
        if self._estimate.largest > self._lost:
            return self._size
        if passed:
            self._orthogonal = self._size
        return None

    def _plan(self, recurrence: Recurrence) -> None:
        """Set how many of the next vectors are orthogonalised against all: as few as keep the forecast small."""
        m = len(recurrence)
        planned = max(0, self._until - m)
        for count in (planned, max(planned, 2), max(planned, self._ahead)):
            self._until = m + count
            if self._forecast(recurrence, count) < self._limit:
                break

    def _forecast(self, recurrence: Recurrence, passes: int) -> float:
        """Largest estimate over the steps ahead, of which the first `passes` are orthogonalised against all."""
        alphas = torch.cat([recurrence.alphas, recurrence.alphas[-1:].expand(self._ahead)])
        betas = torch.cat([recurrence.betas, recurrence.betas[-1:].expand(self._ahead)])
        estimate, worst = self._estimate, 0.0
        for step in range(self._ahead):
            following = self._following(estimate, alphas, betas, len(recurrence) + step)
            estimate = estimate.then(self._after_pass(following) if step < passes else following)
            worst = max(worst, estimate.largest)
        return worst

    def _following(self, estimate: "_Estimate", alphas: Tensor, betas: Tensor, j: int) -> Tensor:
        """(j + 1,) `w_{j+1,i}` for i <= j before any pass, from those of vectors j - 1 and j."""
        following = torch.full((j + 1,), self._base, dtype=torch.float64)
        if j > 0:
            beta = betas[j].clamp_min(torch.finfo(torch.float64).tiny)
            latest = torch.cat([estimate.latest, torch.ones(1, dtype=torch.float64)])  # w_jj = 1
            before = torch.cat([estimate.before, torch.ones(1, dtype=torch.float64)])  # w_{j-1,j-1} = 1
            terms = betas[:j] * latest[1:] + (alphas[:j] - alphas[j]) * latest[:j] - betas[j - 1] * before
            terms[1:] += betas[: j - 1] * latest[: j - 1]
            scale = max(alphas[: j + 1].abs().max().item(), betas[: j + 1].max().item())
            noise = max(self._noise, self._excess * self._base * scale)  # not Simon's b_i + b_j: a product rounds by its norm
            # Signed as the true products are, so that terms cancel where those do; noise may only make each estimate larger.
            following[:j] = ((terms + noise * terms.sign()) / beta).clamp(-1.0, 1.0)
        return following

    def _after_pass(self, following: Tensor) -> Tensor:
        """What a pass over all vectors leaves of these inner products: rounding."""
        return torch.full_like(following, self._base)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Estimate:
    """Estimated inner products of the two latest vectors, j - 1 and j, with those before them.

    Attributes:
        before: (j - 1,) `w_{j-1,i}` for i < j - 1.
        latest: (j,) `w_ji` for i < j.
    """

    before: Tensor
    latest: Tensor

    @property
    def largest(self) -> float:
        """`max_i |w_ji|`; zero where no vector is before j."""
        return self.latest.abs().max().item() if len(self.latest) else 0.0

    def then(self, following: Tensor) -> "_Estimate":
        """That of vectors j and j + 1."""
        return _Estimate(self.latest, following)
