"""Inner products of an operator's vectors, which are all on one device or in parts over processes."""

from typing import Protocol, final

import torch
from torch import Tensor

from curvature_callbacks.linalg import accumulate
from curvature_callbacks.space import LOCAL, Space


class HasDevice(Protocol):
    """An operator, or a part of one: all that inner products need of it."""

    @property
    def device(self) -> torch.device:
        """Device that its vectors are on."""
        ...


@final
class InnerProducts:
    """Inner products in the space of an operator: its attribute `space` where it has one, else the local one.

    All are float64 on the operator's device; see `accumulate` for how they are summed.

    Attributes:
        reads_are_free: whether the host need not wait for a number; else to go on is cheaper than to ask whether it is needed.
            So on a CPU, unless the space has an attribute of this name that says otherwise.
    """

    def __init__(self, operator: HasDevice) -> None:
        self._space: Space = getattr(operator, "space", LOCAL)
        self._device = operator.device
        self.reads_are_free: bool = getattr(self._space, "reads_are_free", self._device.type == "cpu")

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """`x . y` over all processes, as a 0-d tensor."""
        return self._space.total(accumulate.dot(x, y))

    def total(self, partial: Tensor) -> Tensor:
        """The sum of `partial` over the processes that hold parts of the vectors."""
        return self._space.total(partial)

    def norm(self, x: Tensor) -> Tensor:
        """Euclidean norm over all processes, as a 0-d tensor."""
        return self.dot(x, x).sqrt()

    def coefficients(self, basis: Tensor, x: Tensor) -> Tensor:
        """`basis @ x` for `basis` (m, P), (m,)."""
        return self._space.total(accumulate.coefficients(basis, x))

    def gram(self, vectors: Tensor) -> Tensor:
        """`vectors @ vectors.T` for `vectors` (m, P), (m, m)."""
        return self._space.total(accumulate.gram(vectors))

    def random(self, seed: int) -> torch.Generator:
        """A generator for the part of random vectors that this process holds."""
        return torch.Generator().manual_seed(self._space.seed(seed))

    def dimension(self, local: int) -> int:
        """P, the length of the vectors of which this process holds `local` entries."""
        return int(self._sum(local))

    def assembled(self, part: Tensor) -> Tensor:
        """The vector (P,) of which this process holds `part`; `part` itself where no process can hold all of it."""
        return self._space.assembled(part[None], self.dimension(len(part)))[0]

    def part(self, vector: Tensor) -> Tensor:
        """The entries of `vector` (P,) that this process holds."""
        return vector[self._space.part(len(vector))]

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set on any process: all must take the same branch, and clocks differ."""
        return self._sum(flag) > 0

    def average(self, number: float) -> float:
        """Mean of `number` over the processes, the same on each."""
        return self._sum(number) / self._sum(1)

    def _sum(self, number: float) -> float:
        return float(self._space.total(torch.tensor(number, dtype=torch.float64, device=self._device)))
