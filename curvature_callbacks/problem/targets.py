"""The valid targets of a process's microbatches, and whether the loss has what measurements ask of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.model.loss.surrogates import surrogates
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.processes.world import World


def num_valid_targets(objective: Objective, microbatches: Sequence[Any]) -> int:
    """`sum_i n_i` over these microbatches. Cost: one forward pass."""
    with torch.no_grad():
        return sum(int(objective(batch).num_targets.sum()) for batch in microbatches)


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
