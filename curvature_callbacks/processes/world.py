"""World: the processes that train one model together, as everything else sees them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol, final

from torch import Tensor

from curvature_callbacks.space import Space


class World(Space, Protocol):
    """The processes that train one model on different rows. Every method is called by all of them, in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def total(self, partial: Tensor, *, label: str = "") -> Tensor:
        """The sum over processes, the same bits on each; a new tensor. All must ask with the same `label`."""
        ...

    def seed(self, seed: int) -> int:
        """What this process seeds its own part with."""
        ...

    def part(self, length: int) -> slice:
        """The part of a vector of that length that is held here; the parts follow each other by rank."""
        ...

    def assembled(self, part: Tensor, length: int) -> Tensor:
        """(K, length) whole vectors as rows, from the `part` (K, held here) of each."""
        ...

    def reduced(self, partial: Tensor) -> Tensor:
        """(K, held here): the part held here of the sum over processes of `partial` (K, length)."""
        ...

    def concatenated(self, rows: Tensor, length: int, *, label: str = "") -> Tensor:
        """(length, ...) the `rows` of all processes, of which `part(length)` are here. All must ask with the same `label`."""
        ...

    def gathered(self, item: Any) -> list[Any]:
        """What every process gave, by rank. For small things: they are pickled."""
        ...

    def delivered(self, parcels: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        """What every process sent here, by rank.

        Args:
            parcels: for each rank the tensors that go there.
            sizes: for each rank the (shape, dtype) of the tensors that come from there.
        """
        ...

    def broadcast(self, tensors: Sequence[Tensor], *, source: int) -> list[Tensor]:
        """The `tensors` of the process `source`; new ones everywhere else, of the shape, dtype and device of those there."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """A context that all processes leave normally, or all with an exception of the same kind."""
        ...

    def anywhere(self, flag: bool) -> bool:
        """Whether any process says so."""
        ...

    def average(self, number: float) -> float:
        """Over processes, the same on each: for clocks, which differ."""
        ...


@final
class SingleProcess:
    """A world of one."""

    rank = 0
    size = 1

    def total(self, partial: Tensor, *, label: str = "") -> Tensor:
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

    def reduced(self, partial: Tensor) -> Tensor:
        """`partial` itself."""
        return partial

    def concatenated(self, rows: Tensor, length: int, *, label: str = "") -> Tensor:
        """`rows` themselves."""
        return rows

    def gathered(self, item: Any) -> list[Any]:
        """`[item]`."""
        return [item]

    def delivered(self, parcels: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        """The parcel to itself."""
        return [list(parcels[0])]

    def broadcast(self, tensors: Sequence[Tensor], *, source: int) -> list[Tensor]:
        """`tensors` themselves."""
        return list(tensors)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Nothing to agree on."""
        yield

    def anywhere(self, flag: bool) -> bool:
        """`flag` itself."""
        return flag

    def average(self, number: float) -> float:
        """`number` itself."""
        return number


SINGLE: Final = SingleProcess()
