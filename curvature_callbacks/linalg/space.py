"""Space: where the vectors of an operator live, all on one device or in shards over processes."""

from typing import Final, Protocol, final

import torch
from torch import Tensor

from curvature_callbacks.linalg import accumulate
from curvature_callbacks.linalg.operator import Operator


class Space(Protocol):
    """How what each holder of a part of the vectors has summed becomes the sum over whole vectors."""

    def total(self, partial: Tensor) -> Tensor:
        """The sum of `partial` over all holders, the same on each."""
        ...


@final
class LocalSpace:
    """Every vector is here as a whole."""

    def total(self, partial: Tensor) -> Tensor:
        """`partial` itself."""
        return partial


LOCAL: Final = LocalSpace()


@final
class InnerProducts:
    """Inner products in the space of an operator: its attribute `space` where it has one, else the local one.

    All are float64 on the operator's device; see `accumulate` for how they are summed.
    """

    def __init__(self, operator: Operator) -> None:
        self._space: Space = getattr(operator, "space", LOCAL)
        self._device = operator.device

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """`x . y`, 0-d."""
        return self._space.total(accumulate.dot(x, y))

    def norm(self, x: Tensor) -> Tensor:
        """Euclidean norm, 0-d."""
        return self.dot(x, x).sqrt()

    def coefficients(self, basis: Tensor, x: Tensor) -> Tensor:
        """`basis @ x` for `basis` (m, P), (m,)."""
        return self._space.total(accumulate.coefficients(basis, x))

    def gram(self, rows: Tensor) -> Tensor:
        """`rows @ rows.T` for `rows` (m, P), (m, m)."""
        return self._space.total(accumulate.gram(rows))

    def dimension(self, local: Tensor) -> int:
        """Length of the whole vector of which `local` is the part held here."""
        return int(self._sum(local.shape[0]))

    def anywhere(self, flag: bool) -> bool:
        """Whether any holder says so: all must take the same branch, and clocks differ."""
        return self._sum(flag) > 0

    def average(self, number: float) -> float:
        """Over the holders, the same on each."""
        return self._sum(number) / self._sum(1)

    def _sum(self, number: float) -> float:
        return float(self._space.total(torch.tensor(number, dtype=torch.float64, device=self._device)))
