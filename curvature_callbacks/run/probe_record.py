"""The record a probe writes about itself: what it looked at, what it cost, what failed."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch

from curvature_callbacks.batches import batch_size
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import PROBE, Record

PROBE_HEADLINE: Final = ("probe_seconds", "failed")

_logger = logging.getLogger("curvature_callbacks")


def probe_record(
    problem: Problem,
    records: Sequence[Record],
    *,
    seconds: float,
    sink_seconds: float,
    switched_off: Collection[str],
    skipped: Collection[str],
    overhead: float,
    about: Mapping[str, Any],
) -> Record:
    """The probe about itself.

    Args:
        problem: what it measured.
        records: of its measurements.
        seconds: wall time it took.
        sink_seconds: wall time the sinks took at the probe before.
        switched_off: measurements that are not tried again.
        skipped: measurements that it had no time for.
        overhead: share of wall time that all probes of the run have taken so far.
        about: why and how it was drawn, for the metadata.

    Cost: one gradient where no measurement has taken it: the unit of all costs.
    """
    average = problem.world.average  # processes have clocks of their own, and records are the same on all
    scalars = {
        "probe_seconds": average(seconds),
        "sink_seconds": average(sink_seconds),
        "matvecs": float(sum(record.num_matvecs for record in records)),
        "rows": float(problem.num_rows),
        "microbatch_size": float(max(problem.world.gathered(max(map(batch_size, problem.microbatches))))),
        "overhead": average(overhead),
        "skipped": float(len(skipped)),
        "failed": float(len({record.measurement for record in records if record.failed}.union(switched_off))),
        "non_finite": float(sum(not math.isfinite(value) for record in records for value in record.scalars.values())),
    }
    if _has_gradient(problem):
        scalars["gradient_equivalents"] = scalars["probe_seconds"] / average(problem.gradient_seconds)
    metadata = {
        "seed": problem.seed,
        **about,
        "torch": torch.__version__,
        "blocks": list(problem.blocks),
    }
    return Record(
        step=problem.step, measurement=PROBE, scalars=scalars, headline=PROBE_HEADLINE, seconds=seconds, metadata=metadata
    )


def _has_gradient(problem: Problem) -> bool:
    """Whether one gradient, the unit of all costs, could be timed."""
    try:
        with problem.world.together():
            return len(problem.gradients) > 0
    except Exception as error:  # the measurements have met and reported what is wrong
        _logger.debug("no gradient to compare the cost of this probe with: %s", error)
        return False
