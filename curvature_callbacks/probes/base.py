"""Probes: where the microbatches of a probe come from, and the seeds of what their losses draw."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, final

from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.processes.world import World

Draw = Literal["fresh", "fixed"]
Prepare = Callable[[Any], Any]


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from SHA-1 of the parts, equal in every process (`hash()` is salted)."""
    digest = hashlib.sha1(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def with_seeds(batches: Iterable[Any], seed: int, world: World) -> list[Microbatch]:
    """Microbatches whose losses draw with a seed of their own, made of the probe's; those that have one keep it."""
    microbatches = map(as_microbatch, batches)
    return [
        microbatch if microbatch.seed is not None else replace(microbatch, seed=stable_seed(seed, world.rank, index))
        for index, microbatch in enumerate(microbatches)
    ]


class Probes(ABC):
    """A source of microbatches. Call `draw` inside `isolated(model)`: it may use the global generators."""

    @abstractmethod
    def draw(self, seed: int) -> Sequence[Any] | None:
        """The microbatches that belong to `seed`, or None while there is no data yet.

        Each is a `Microbatch`, which knows its rows, or a batch whose rows are then counted by inspection.
        """

    def draw_whole(self, seed: int) -> Sequence[Any] | None:
        """Whole batches, for losses that couple the rows of one; None while there is no data yet.

        As many rows as training has in a batch of this process; by default the microbatches, which have to be that.
        """
        return self.draw(seed)


@final
class FixedProbes(Probes):
    """The same microbatches at every probe."""

    def __init__(self, microbatches: Sequence[Any]) -> None:
        self._microbatches = list(microbatches)

    def draw(self, seed: int) -> list[Any]:
        """All of the microbatches, whatever the seed."""
        return self._microbatches
