"""Passed: what the hooked passes over all microbatches were, and the pseudo-samples they make up."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, final

import torch
from torch import Tensor

from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.loss.surrogates import Surrogate
from curvature_callbacks.processes.world import World

T = TypeVar("T")

Uses = list[list[Placed]]  # of one parameter, by backward pass


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """What forward passes over microbatches saw; all of it is known before the last backward pass begins.

    Attributes:
        sizes: rows of each backward pass, in order.
        num_passes: backward passes of each microbatch.
        num_targets: for each microbatch (rows,) valid targets, on the CPU.
        operations: parameter to the operations that used it.
        positions: parameter to the positions per sample of each use.
    """

    sizes: Sequence[int] = ()
    num_passes: Sequence[int] = ()
    num_targets: Sequence[Tensor] = ()
    operations: Mapping[str, list[Operation]] = field(default_factory=dict)
    positions: Mapping[str, list[int]] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence["Observed"]) -> "Observed":
        """The passes of several microbatches, or of several processes by rank, one after the other."""
        return cls(
            sizes=[size for part in parts for size in part.sizes],
            num_passes=[number for part in parts for number in part.num_passes],
            num_targets=[targets for part in parts for targets in part.num_targets],
            operations=merged([part.operations for part in parts]),
            positions=merged([part.positions for part in parts]),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passed:
    """The passes of this process.

    Attributes:
        microbatches: as they were run: the first, and small ones after it together.
        surrogates: for each microbatch what its backward passes differentiate; `[None]` for its sum of losses.
        observed: what its forward passes saw.
        unruled: parameter to why it has no valid rule, on any process.
    """

    microbatches: Sequence[Microbatch]
    surrogates: Sequence[Sequence[Surrogate | None]]
    observed: Observed = Observed()
    unruled: Mapping[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Remainder:
    """The parameters whose Grams a round of passes does not give.

    Attributes:
        postponed: names left to the next round.
        unruled: name to why the parameter has no valid rule, in this round or before.
    """

    postponed: Sequence[str]
    unruled: Mapping[str, str]


def merged(parts: Iterable[Mapping[str, Sequence[T]]]) -> dict[str, list[T]]:
    """Name to its lists in all parts, one after the other."""
    lists: dict[str, list[T]] = {}
    for part in parts:
        for name, items in part.items():
            lists.setdefault(name, []).extend(items)
    return lists


def pseudo_samples(passed: Passed, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Row, weight and presence of every row of every backward pass of all processes, on the CPU."""
    local = _local_pseudo_samples(passed)
    if world.size == 1:
        return local
    rows = sum(map(len, passed.observed.num_targets))
    shifted, start = [], 0
    for number, samples, weights, active in world.gathered((rows, *local)):
        shifted.append((samples + start, weights, active))
        start += number
    samples, weights, active = (torch.cat(parts) for parts in zip(*shifted, strict=True))
    return samples, weights, active


def _local_pseudo_samples(passed: Passed) -> tuple[Tensor, Tensor, Tensor]:
    if not passed.surrogates:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.bool)
    samples, weights, active, start = [], [], [], 0
    for targets, chosen in zip(passed.observed.num_targets, passed.surrogates, strict=True):
        for surrogate in chosen:
            samples.append(torch.arange(start, start + len(targets)))
            ones = torch.ones(len(targets), dtype=torch.float64)
            weights.append(ones if surrogate is None else surrogate.weights.cpu())
            active.append(ones.bool() if surrogate is None else surrogate.active.cpu())
        start += len(targets)
    return torch.cat(samples), torch.cat(weights), torch.cat(active)
