"""Whether rows may be sliced out of a microbatch: a loss may need them collated by themselves."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from curvature_callbacks.errors import is_out_of_memory, named
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes.group import is_agreed

_MOST_ROWS: Final = 4  # looked at one by one

_logger = logging.getLogger("curvature_callbacks")


def may_slice(problem: Problem, memory: ProbeMemory) -> bool:
    """Whether slices of the microbatches will do, where every tensor has one row a row.

    Found out once a run: they will not where the loss of a single row can only be computed after it was collated by itself,
    as with targets that are padded to the longest row of a batch and outputs that are not.

    Cost: once a run forward passes of at most four rows; twice as many where slices will not do.
    """
    if memory.may_slice is None and not problem.objective.is_sharded:
        first = problem.microbatches[0]
        with problem.world.together():
            needs_collating = first.is_sliceable and first.collate is not None and _needs_collating(problem.objective, first)
        memory.may_slice = not problem.world.anywhere(needs_collating)
    return memory.may_slice is not False


def unsliced(microbatches: Sequence[Microbatch]) -> list[Microbatch]:
    """The microbatches with rows that are collated anew."""
    return [each if each.collate is None else replace(each, is_sliceable=False) for each in microbatches]


def _needs_collating(objective: Objective, microbatch: Microbatch) -> bool:
    rows = torch.linspace(0, microbatch.num_rows - 1, min(microbatch.num_rows, _MOST_ROWS)).round().long()
    if microbatch.num_rows < 2 or _have_losses(objective, [microbatch.take(row[None]) for row in rows]):
        return False
    collated = replace(microbatch, is_sliceable=False)
    return _have_losses(objective, [collated.take(row[None]) for row in rows])


def _have_losses(objective: Objective, microbatches: Sequence[Microbatch]) -> bool:
    try:
        with torch.no_grad():
            for microbatch in microbatches:
                objective(microbatch)
    except Exception as error:
        if is_agreed(error) or is_out_of_memory(error):
            raise
        _logger.debug("a row by itself has no loss: %s", named(error))
        return False
    return True
