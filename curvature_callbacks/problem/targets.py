"""The valid targets of a process's microbatches, and whether the loss has what measurements ask of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from curvature_callbacks.errors import ConfigurationError, is_out_of_memory
from curvature_callbacks.microbatch import Microbatch, few_rows
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.model.loss.surrogates import surrogates
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.processes.group import is_agreed
from curvature_callbacks.processes.world import World

_REPEATED: Final = 1e-5  # relative difference of two evaluations; nondeterministic kernels of float32 give 1e-6
_ROUNDING: Final = 1e-6  # of the loss of a row, where gains and losses cancel


def num_valid_targets(objective: Objective, microbatches: Sequence[Any]) -> int:
    """`sum_i n_i` over these microbatches. Cost: one forward pass."""
    with torch.no_grad():
        return sum(int(objective(batch).num_targets.sum()) for batch in microbatches)


def check_repeatable(objective: Objective, microbatch: Microbatch) -> None:
    """Raise a `ConfigurationError` where two evaluations of the loss differ by more than nondeterministic kernels do.

    Cost: two forward passes over two rows, or over all of a microbatch that stays whole or has a loss as a whole only.
    """
    with torch.no_grad():
        try:
            rows = few_rows(microbatch)
            first = objective(rows)
        except Exception as error:
            if is_agreed(error) or is_out_of_memory(error) or objective.is_sharded:
                raise
            rows = microbatch
            first = objective(rows)
        second = objective(rows)
    values = float(first.total), float(second.total)
    rounding = max(_REPEATED * max(map(abs, values)), _ROUNDING * len(first.num_targets))
    if math.isfinite(values[0] - values[1]) and abs(values[0] - values[1]) > rounding:
        raise ConfigurationError(
            f"the loss of the same rows at the same parameters is {values[0]:.6g} and then {values[1]:.6g}: it draws from a "
            "generator that a probe cannot find (a global variable, one within an object), or counts its calls. Let it draw "
            "from the global generators or from one that is an attribute of a module or of the loss function's closure."
        )


@final
@dataclass(frozen=True, slots=True)
class Targets:
    """What a first look at the microbatches of a process shows.

    Attributes:
        counts: valid targets of each microbatch.
        coupled: the part of the loss that is one of all rows together; None where none is known.
    """

    counts: Sequence[int]
    coupled: str | None


def check_targets(
    objective: Objective, microbatches: Sequence[Any], fisher_types: Sequence[FisherType], *, seed: int, world: World
) -> Targets:
    """The targets of a process's microbatches.

    Raises:
        ConfigurationError: no sample of any process has a valid one, or the loss lacks a type of Fisher.

    Cost: one forward pass.
    """
    counts, coupled = [], None
    with torch.no_grad():
        for batch in microbatches:
            losses = objective(batch)
            counts.append(int(losses.num_targets.sum()))
            coupled = coupled or losses.coupled
            for fisher_type in fisher_types:
                if fisher_type != EMPIRICAL:  # which every loss has
                    surrogates(fisher_type, losses, seed=seed)
    if world.total(torch.tensor(sum(counts))) == 0:
        raise ConfigurationError(
            "every label of the drawn microbatches is ignored (-100): the loss is undefined. Check the collator and the "
            "labels, or give probe data of its own."
        )
    return Targets(counts, coupled)
