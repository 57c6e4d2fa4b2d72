"""Draws: the random numbers of a loss, the same in every evaluation of a microbatch at one probe."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from curvature_callbacks.isolation.generators import begun_at, has_moved
from curvature_callbacks.isolation.row_draws import DrawsOfBatch
from curvature_callbacks.isolation.snapshot import generator_state
from curvature_callbacks.microbatch import Microbatch

_Root = tuple[int, int]  # seed and number of rows of a microbatch that was drawn


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
        self._has_looked = False
        self._known: dict[_Root, _Known] = {}
        self._pieces: dict[_Root, list[tuple[Tensor, _Known]]] = {}  # rows of some, where all of a microbatch was not evaluated

    def forget(self) -> None:
        """Another probe: its microbatches draw anew, and a loss may have changed what it draws."""
        self._known.clear()
        self._pieces.clear()

    @contextmanager
    def at(self, microbatch: Microbatch, generators: Generators) -> Iterator[None]:
        """Inside, the loss of `microbatch` draws the same numbers every time: those of its seed.

        A piece of a microbatch draws what its rows have in the draw of all of it, once all of it was evaluated twice. Where
        that has not happened, because all of it does not fit into memory, it has a draw of its own, and so do its own pieces
        what their rows have in that. The generators are as before afterwards.

        Args:
            microbatch: with its seed; None stands for 0.
            generators: that the loss may draw from, those of the process at every call in the same order.

        Raises:
            RefusedError: inside, where the numbers of a batch do not belong to rows and a piece of it draws.

        Cost: at the first evaluation of a microbatch, where it is found out what the loss draws from, a fraction of a
        millisecond; later ones nothing where it draws nothing, else some ten microseconds. Noting the shapes of a random loss,
        once a microbatch, and looking for draws at the first evaluation of a run: some microseconds an operation.
        """
        seed, among = microbatch.seed or 0, microbatch.among
        root = seed, microbatch.num_rows if among is None else among.num_rows
        whole = self._known.get(root)
        if whole is not None and (among is None or whole.is_replayable):
            evaluation: AbstractContextManager[None] = self._again(whole, generators, None if among is None else among.rows)
        elif among is None:
            self._known[root] = known = self._new(microbatch.num_rows, seed)
            evaluation = self._first(known, generators)
        else:
            evaluation = self._of_piece(root, among.rows, generators)
        with evaluation:
            yield

    def _of_piece(self, root: "_Root", rows: Tensor, generators: Generators) -> AbstractContextManager[None]:
        """An evaluation of some rows of a microbatch of which no evaluation is known."""
        pieces = self._pieces.setdefault(root, [])
        for of_piece, known in pieces:
            places = (of_piece[None] == rows[:, None]).nonzero()[:, 1]
            is_all = torch.equal(of_piece, rows)
            if len(places) == len(rows) and (is_all or known.is_replayable):
                return self._again(known, generators, None if is_all else places)
        known = self._new(len(rows), root[0] + 1 + int(rows[0]))
        if len(rows) > 1:
            pieces.append((rows, known))
        return self._first(known, generators)

    def _new(self, num_rows: int, seed: int) -> "_Known":
        """Of an evaluation whose operations are noted, if it is the first of a run or the loss is known to draw.

        Whoever computes the loss may put generators back, so that their states do not tell.
        """
        return _Known(DrawsOfBatch(num_rows), seed, is_noted=self.is_random or not self._has_looked)

    @contextmanager
    def _first(self, known: "_Known", generators: Generators) -> Iterator[None]:
        """An evaluation in which it is found out which generators the loss moves."""
        known.draws.draws.clear()
        with begun_at([*generators.kept, *generators.shared], known.seed):
            kept, shared = (list(map(generator_state, some)) for some in (generators.kept, generators.shared))
            with known.draws.noted() if known.is_noted else nullcontext():
                yield
            known.moved = [index for index, state in enumerate(shared) if has_moved(generators.shared[index], state)]
            known.is_random = bool(known.moved or known.draws.draws) or any(map(has_moved, generators.kept, kept))
            known.is_complete = self._has_looked = True
        self.is_random |= known.is_random

    @contextmanager
    def _again(self, known: "_Known", generators: Generators, rows: Tensor | None) -> Iterator[None]:
        """A later evaluation of a microbatch, or of some of its rows."""
        if not known.is_complete:  # the first one was left by an exception
            with self._first(known, generators):
                yield
            return
        with begun_at([*generators.kept, *(generators.shared[index] for index in known.moved)], known.seed):
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
        seed: that generators begin at.
        is_noted: whether they are.
        is_complete: whether the first evaluation has ended.
        is_random: whether there are any.
        moved: which generators of the process were drawn from.
    """

    draws: DrawsOfBatch
    seed: int
    is_noted: bool
    is_complete: bool = False
    is_random: bool = False
    moved: Sequence[int] = ()

    @property
    def is_replayable(self) -> bool:
        """Whether single rows can have what they had in it."""
        return self.is_complete and (self.is_noted or not self.is_random)
