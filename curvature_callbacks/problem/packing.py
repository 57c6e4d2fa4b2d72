"""Whether packed rows can be measured sequence by sequence: their loss has to be that of the sequences in them."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from curvature_callbacks.errors import is_out_of_memory, named
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.problem.evaluation import TOLERANCE, difference, evaluated_objective
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes.group import is_agreed

_logger = logging.getLogger("curvature_callbacks")


def may_take_apart(problem: Problem, memory: ProbeMemory) -> bool:
    """Whether the rows of this problem, where they are sequences out of packed ones, have the loss that trains.

    Found out once a run, at the first packed microbatch of each process: the mean loss of its sequences, each in a row of its
    own, is that of the packed rows, and so is its gradient. It is not where attention or a state goes on from one sequence to
    the next, or where the first token of a sequence is a target of the one before it. Then a sample is a packed row, which is
    said once.

    Cost: once a run two gradients of a microbatch.
    """
    packed = [microbatch for microbatch in problem.microbatches if microbatch.packed is not None]
    if not problem.world.anywhere(bool(packed)):
        return True
    if memory.takes_packed_apart is None:
        if problem.objective.is_sharded and problem.world.anywhere(not packed):
            return False  # every pass is one of all processes, and some have nothing to compare
        apart = _difference(problem, packed[0]) if packed else None
        found = [each for each in problem.world.gathered(apart) if each is not None]
        memory.takes_packed_apart = not found
        if found and problem.world.rank == 0:
            _logger.warning(
                "several sequences are packed in a row, and the loss of such a row is not that of its sequences (%s): a sample "
                "of Fishers and Grams is a packed row. For sequences mask their first labels (-100) and use an attention that "
                "keeps them apart, or pass a `probe_dataloader` that pads.",
                found[0],
            )
    return memory.takes_packed_apart


def as_drawn(microbatches: Sequence[Microbatch]) -> list[Microbatch]:
    """The microbatches with packed rows as rows."""
    return [microbatch.as_packed() for microbatch in microbatches]


def _difference(problem: Problem, microbatch: Microbatch) -> str | None:
    """How the loss of a microbatch differs from that of the packed rows it was made of; None where it does not.

    Gradients are compared as well: near initialisation a token's loss hardly depends on what it may attend to.
    """
    objective = problem.objective
    leaves = objective.leaves()
    rows = range(microbatch.num_rows)
    try:
        alone = microbatch if microbatch.collate is None else replace(microbatch, content=microbatch.collate(rows))
        apart, packed = (evaluated_objective(objective, each, leaves, problem.seed) for each in (alone, microbatch.as_packed()))
    except Exception as error:
        if is_agreed(error) or is_out_of_memory(error):
            raise
        return named(error)
    found = difference(apart, packed)
    if found.is_finite and not found.exceeds(TOLERANCE):
        return None
    return f"{packed.value:.6g} and {apart.value:.6g}, gradients {found.gradient:.2g} of their norm apart"
