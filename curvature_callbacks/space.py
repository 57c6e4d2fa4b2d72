"""Space: where the vectors of an operator are, all in one process or in parts over several."""

from typing import Final, Protocol

from torch import Tensor
from typing_extensions import override


class Space(Protocol):
    """How the vectors of an operator are divided over processes, and how sums over their parts become sums over vectors."""

    def total(self, partial: Tensor) -> Tensor:
        """The sum of `partial` over the processes, the same on each."""
        ...

    def seed(self, seed: int) -> int:
        """The seed for this process's part of a random vector."""
        ...

    def part(self, length: int) -> slice:
        """The entries of a vector of this length that this process holds."""
        ...

    def assembled(self, part: Tensor, length: int) -> Tensor:
        """(K, length) vectors from the `part` (K, n) of each that every process holds."""
        ...


class LocalSpace(Space):
    """Every process holds all entries of every vector."""

    @override
    def total(self, partial: Tensor) -> Tensor:
        return partial

    @override
    def seed(self, seed: int) -> int:
        return seed

    @override
    def part(self, length: int) -> slice:
        return slice(0, length)

    @override
    def assembled(self, part: Tensor, length: int) -> Tensor:
        return part


LOCAL: Final = LocalSpace()
