"""The record a probe writes about itself: what it looked at, what it cost, what failed."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch

from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import PROBE, Record
from curvature_callbacks.run.failures import Failures
from curvature_callbacks.run.training_losses import TrainingLosses

PROBE_HEADLINE: Final = ("probe_seconds", "failed")


def probe_record(
    problem: Problem,
    records: Sequence[Record],
    *,
    failures: Failures,
    training_losses: TrainingLosses,
    seconds: float,
    sink_seconds: float,
    skipped: Collection[str],
    overhead: float,
    about: Mapping[str, Any],
) -> Record:
    """What a probe looked at, what it cost and what failed.

    Args:
        problem: what it measured.
        records: of its measurements.
        failures: of the run.
        training_losses: of the run; the probe's is compared with them.
        seconds: wall time it took.
        sink_seconds: wall time the sinks took at the probe before.
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
        "microbatch_size": float(max(problem.world.gathered(max(microbatch.num_rows for microbatch in problem.microbatches)))),
        "overhead": average(overhead),
        "skipped": float(len(skipped)),
        "failed": float(len({record.measurement for record in records if record.failed}.union(failures.switched_off))),
        "non_finite": float(sum(not math.isfinite(value) for record in records for value in record.scalars.values())),
    }
    if _has_gradient(problem, records, failures):
        scalars["gradient_equivalents"] = scalars["probe_seconds"] / average(problem.gradient_seconds)
        with failures.reported("loss", "the loss of a curvature probe cannot be computed on whole batches"):
            scalars |= training_losses.beside(problem)
    metadata = {
        "seed": problem.seed,
        **about,
        "torch": torch.__version__,
        "blocks": list(problem.blocks),
        "objective": dict(problem.proof),
    }
    return Record(
        step=problem.step, measurement=PROBE, scalars=scalars, headline=PROBE_HEADLINE, seconds=seconds, metadata=metadata
    )


def _has_gradient(problem: Problem, records: Sequence[Record], failures: Failures) -> bool:
    """Whether one gradient, the unit of all costs, could be timed; where nothing else failed it is warned of once."""
    what = "the gradient in which the cost of a curvature probe is counted cannot be computed"
    with failures.reported("gradient", what, is_known=any(record.failed for record in records)), problem.world.together():
        return len(problem.gradients) > 0
    return False
