"""What every example does before and after training: an empty run directory, and the numbers of the last probe."""

import math
from collections.abc import Sequence
from pathlib import Path

from curvature_callbacks import Record


def cleared(logdir: Path) -> Path:
    """`logdir` without the curves of an earlier run of the same example, which TensorBoard would draw as one zigzag."""
    logdir.mkdir(parents=True, exist_ok=True)
    for old in [*logdir.glob("events.out.tfevents.*"), logdir / "curvature.jsonl"]:
        old.unlink(missing_ok=True)
    return logdir


def print_closing(history: Sequence[Record], *, training_seconds: float, logdir: Path) -> None:
    """The last probe's table, the share of wall time all probes took, and how to look at the curves."""
    print(block_table(history))
    probe_seconds = [record.scalars["probe_seconds"] for record in history if record.measurement == "probe"]
    share = sum(probe_seconds) / training_seconds
    print(f"{len(probe_seconds)} probes took {share:.0%} of {training_seconds:.1f} s of training.")
    print(f"Look at the curves:  tensorboard --logdir {logdir}")


def block_table(history: Sequence[Record]) -> str:
    """A row a block: condition number of its Fisher, largest eigenvalue of its Hessian with the residual that bounds it."""
    step = history[-1].step
    last = {(record.measurement, record.block): record.scalars for record in history if record.step == step}
    rows = [f"{'block':<20}{'Fisher condition':>18}{'Hessian largest':>18}{'residual':>12}"]
    for (measurement, block), scalars in last.items():
        if measurement == "empirical_fisher" and block is not None:
            hessian = last.get(("hessian", block), {})
            largest, residual = hessian.get("lambda_max", math.nan), hessian.get("residual_lambda_max", math.nan)
            rows.append(f"{block:<20}{scalars['condition_number']:>18.3g}{largest:>18.3g}{residual:>12.2g}")
    return "\n".join([f"last probe, step {step}", *rows])
