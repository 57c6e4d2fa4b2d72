"""Space: where the vectors of an operator live, all on one device or in shards over processes."""

from typing import Protocol, final

import torch
from torch import Tensor

from curvature_callbacks.linalg import accumulate
from curvature_callbacks.space import LOCAL, Space


class HasDevice(Protocol):
    """What has vectors: an operator, or a part of one."""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        ...


@final
class InnerProducts:
    """Inner products in the space of an operator: its attribute `space` where it has one, else the local one.

    All are float64 on the operator's device; see `accumulate` for how they are summed.
    """

    def __init__(self, operator: HasDevice) -> None:
        self._space: Space = getattr(operator, "space", LOCAL)
        self._device = operator.device

    @property
    def reads_are_free(self) -> bool:
        """Whether the host need not wait for a number; else to go on is cheaper than to ask whether it is needed."""
        return self._device.type == "cpu"

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """`x . y`, 0-d."""
        return self._space.total(accumulate.dot(x, y))

    def total(self, partial: Tensor) -> Tensor:
        """The sum of `partial` over the holders."""
        return self._space.total(partial)

    def norm(self, x: Tensor) -> Tensor:
        """Euclidean norm, 0-d."""
        return self.dot(x, x).sqrt()

    def coefficients(self, basis: Tensor, x: Tensor) -> Tensor:
        """`basis @ x` for `basis` (m, P), (m,)."""
        return self._space.total(accumulate.coefficients(basis, x))

    def gram(self, rows: Tensor) -> Tensor:
        """`rows @ rows.T` for `rows` (m, P), (m, m)."""
        return self._space.total(accumulate.gram(rows))

    def random(self, seed: int) -> torch.Generator:
        """A generator for the part of random vectors that is held here."""
        return torch.Generator().manual_seed(self._space.seed(seed))

    def dimension(self, local: int) -> int:
        """Length of whole vectors, of which `local` entries are held here."""
        return int(self._sum(local))

    def assembled(self, part: Tensor) -> Tensor:
        """The vector (P,) of which `part` is held here; only that where nobody can hold whole ones."""
        return self._space.assembled(part[None], self.dimension(len(part)))[0]

    def part(self, whole: Tensor) -> Tensor:
        """What is held here of the vector `whole` (P,)."""
        return whole[self._space.part(len(whole))]

    def anywhere(self, flag: bool) -> bool:
        """Whether any holder says so: all must take the same branch, and clocks differ."""
        return self._sum(flag) > 0

    def average(self, number: float) -> float:
        """Over the holders, the same on each."""
        return self._sum(number) / self._sum(1)

    def _sum(self, number: float) -> float:
        return float(self._space.total(torch.tensor(number, dtype=torch.float64, device=self._device)))
