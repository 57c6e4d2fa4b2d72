"""World: the processes that train one model together, as everything else sees them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol, final

from torch import Tensor
from typing_extensions import override

from curvature_callbacks.space import LocalSpace, Space


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
        """(K, length) vectors, one a row, put together from the `part` (K, held here) of each."""
        ...

    def reduced(self, partial: Tensor) -> Tensor:
        """(K, held here): the part held here of the sum over processes of `partial` (K, length)."""
        ...

    def concatenated(self, slices: Tensor, length: int, *, label: str = "") -> Tensor:
        """(length, ...) the `slices` of all processes, of which `part(length)` are here. All must ask with the same `label`."""
        ...

    def gathered(self, item: Any) -> list[Any]:
        """What every process gave, by rank. For small things: they are pickled."""
        ...

    def delivered(self, parcels: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        """What every process sent to this one, by rank.

        Args:
            parcels: for each rank the tensors that go there.
            sizes: for each rank the (shape, dtype) of the tensors that come from there.
        """
        ...

    def broadcast(self, tensors: Sequence[Tensor], *, source: int) -> list[Tensor]:
        """The `tensors` of the process `source`; new ones everywhere else, of the shape, dtype and device of those given."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """A context that all processes leave normally, or all with an exception of the same category."""
        ...

    def anywhere(self, flag: bool) -> bool:
        """Whether it is True in any process."""
        ...

    def average(self, number: float) -> float:
        """The mean over processes, the same on each: for clocks, which differ."""
        ...


@final
class SingleProcess(LocalSpace, World):
    """A world of one process, which exchanges nothing: sums, parts and broadcasts are what it was given."""

    rank = 0
    size = 1

    @override
    def total(self, partial: Tensor, *, label: str = "") -> Tensor:
        return partial

    @override
    def reduced(self, partial: Tensor) -> Tensor:
        return partial

    @override
    def concatenated(self, slices: Tensor, length: int, *, label: str = "") -> Tensor:
        return slices

    @override
    def gathered(self, item: Any) -> list[Any]:
        return [item]

    @override
    def delivered(self, parcels: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        return [list(parcels[0])]

    @override
    def broadcast(self, tensors: Sequence[Tensor], *, source: int) -> list[Tensor]:
        return list(tensors)

    @override
    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    @override
    def anywhere(self, flag: bool) -> bool:
        return flag

    @override
    def average(self, number: float) -> float:
        return number


SINGLE: Final = SingleProcess()
