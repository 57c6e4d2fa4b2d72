"""Space: where the vectors of an operator live, all on one device or in shards over processes."""

from typing import Final, Protocol, final

from torch import Tensor


class Space(Protocol):
    """How what each holder of a part of the vectors has summed becomes the sum over whole vectors."""

    def total(self, partial: Tensor) -> Tensor:
        """The sum of `partial` over all holders, the same on each."""
        ...

    def seed(self, seed: int) -> int:
        """What this holder seeds its part of a random vector with."""
        ...

    def part(self, length: int) -> slice:
        """The part of a vector of that length that is held here."""
        ...

    def assembled(self, part: Tensor, length: int) -> Tensor:
        """(K, length) whole vectors as rows, from the `part` (K, held here) of each."""
        ...


@final
class LocalSpace:
    """Every vector is here as a whole."""

    def total(self, partial: Tensor) -> Tensor:
        """`partial` itself."""
        return partial

    def seed(self, seed: int) -> int:
        """`seed` itself."""
        return seed

    def part(self, length: int) -> slice:
        """All of it."""
        return slice(0, length)

    def assembled(self, part: Tensor, length: int) -> Tensor:
        """`part` itself."""
        return part


LOCAL: Final = LocalSpace()
