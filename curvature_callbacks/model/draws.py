"""Draws: the random numbers of a loss, the same in every evaluation of a microbatch at one probe."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from curvature_callbacks.isolation.generators import begun_at, has_moved
from curvature_callbacks.isolation.row_draws import DrawsOfBatch
from curvature_callbacks.isolation.snapshot import generator_state
from curvature_callbacks.microbatch import Microbatch


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generators:
    """What a loss may draw from.

    Attributes:
        kept: generators that modules or the loss keep.
        shared: those of the process.
    """

    kept: Sequence[Any]
    shared: Sequence[Any]


@final
class Draws:
    """What the loss of a run draws from the global generators and from those that modules keep.

    Attributes:
        is_random: whether any evaluation so far has drawn.
    """

    def __init__(self) -> None:
        self.is_random = False
        self._known: dict[Hashable, _Known] = {}

    def forget(self) -> None:
        """Another probe: its microbatches draw anew, and a loss may have changed what it draws."""
        self._known.clear()

    @contextmanager
    def at(self, microbatch: Microbatch, generators: Generators) -> Iterator[None]:
        """Inside, the loss of `microbatch` draws the same numbers every time: those of its seed.

        A piece of a microbatch draws what its rows have in the draw of all of it, once all of it was evaluated twice; before
        that it has a draw of its own. The generators are as before afterwards.

        Args:
            microbatch: with its seed; None stands for 0.
            generators: that the loss may draw from, those of the process at every call in the same order.

        Raises:
            RefusedError: inside, where the numbers of a batch do not belong to rows and a piece of it draws.

        Cost: at the first evaluation of a microbatch, where it is found out what the loss draws from, a fraction of a
        millisecond; later ones nothing where it draws nothing, else some ten microseconds. Noting the shapes of a random loss,
        once a microbatch, some microseconds an operation.
        """
        seed, among = microbatch.seed or 0, microbatch.among
        whole = self._known.get((seed, microbatch.num_rows if among is None else among.num_rows))
        if whole is not None and (among is None or whole.is_noted or not whole.is_random):
            evaluation = self._again(whole, seed, generators, None if among is None else among.rows)
        elif among is None:
            evaluation = self._first((seed, microbatch.num_rows), seed, generators, microbatch.num_rows)
        else:
            evaluation = self._first(None, seed + 1 + int(among.rows[0]), generators, microbatch.num_rows)
        with evaluation:
            yield

    @contextmanager
    def _first(self, key: Hashable, seed: int, generators: Generators, num_rows: int) -> Iterator[None]:
        """An evaluation in which it is found out which generators the loss moves."""
        known = _Known(DrawsOfBatch(num_rows), is_noted=self.is_random)
        with begun_at([*generators.kept, *generators.shared], seed):
            kept, shared = (list(map(generator_state, some)) for some in (generators.kept, generators.shared))
            with known.draws.noted() if known.is_noted else nullcontext():
                yield
            known.moved = [index for index, state in enumerate(shared) if has_moved(generators.shared[index], state)]
            known.is_random = bool(known.moved) or any(map(has_moved, generators.kept, kept))
        self.is_random |= known.is_random
        if key is not None:
            self._known[key] = known

    @contextmanager
    def _again(self, known: "_Known", seed: int, generators: Generators, rows: Tensor | None) -> Iterator[None]:
        """A later evaluation of a microbatch, or of some of its rows."""
        with begun_at([*generators.kept, *(generators.shared[index] for index in known.moved)], seed):
            if not known.is_random:
                yield
            elif rows is not None:
                with known.draws.of_rows(rows):
                    yield
            elif known.is_noted:
                yield
            else:
                known.draws.draws.clear()
                with known.draws.noted():
                    yield
                known.is_noted = True


@final
@dataclass(slots=True, eq=False)
class _Known:
    """What is known of the draws of a microbatch.

    Attributes:
        draws: the operations that drew, once they are noted.
        is_noted: whether they are.
        is_random: whether there are any.
        moved: which generators of the process were drawn from.
    """

    draws: DrawsOfBatch
    is_noted: bool
    is_random: bool = False
    moved: Sequence[int] = ()
