"""What a user adds without touching the package: a measurement, a sink, a schedule, by classes of their own.

An operator of one's own: tests/problem/test_users_operator.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from curvature_callbacks import CurvatureMonitor, EveryNSteps, Measurement, Problem, Record, Schedule, Sink
from curvature_callbacks.sinks.tensorboard import TensorBoardSink
from tests.sinks.tag_cases import NotingWriter


class GradientSigns:
    """Share of positive gradient elements of each block, and a histogram of the gradient's squares; counts its probes."""

    name = "signs"

    def init(self, problem: Problem) -> int:
        return 0

    def measure(self, problem: Problem, state: int) -> tuple[list[Record], int]:
        blocks = [self._block(problem, block, names) for block, names in problem.blocks.items()]
        total = Record(step=problem.step, measurement=self.name, scalars={"probes": state + 1.0, "blocks": float(len(blocks))})
        return [total, *blocks], state + 1

    def _block(self, problem: Problem, block: str, names: Sequence[str]) -> Record:
        gradient = torch.cat([problem.gradients[name].flatten() for name in names])
        return Record(
            step=problem.step,
            measurement=self.name,
            block=block,
            scalars={"positive": (gradient > 0).float().mean().item(), "size": float(len(gradient))},
            curves=("positive",),
            arrays={"squares": gradient.square().tolist(), "signs": gradient.sign().tolist()},
            charts={"squares": "histogram"},
        )


class Lines:
    """One line of text a probe."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, records: Sequence[Record]) -> None:
        self.lines.append(f"{records[0].step}: " + " ".join(sorted({record.measurement for record in records})))


class WhenSquare:
    def due(self, step: int, previous: int | None) -> bool:
        return int(step**0.5) ** 2 == step and step != previous


def run(*, measure: Sequence[Measurement], sink: Sink, when: Schedule, num_steps: int) -> list[Record]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batch: Any = torch.randn(6, 4), torch.randint(3, (6,))
    monitor = CurvatureMonitor(model, probes=[batch], loss="cross_entropy", measure=measure, when=when, sinks=[sink])
    for step in range(num_steps):
        monitor.step(step)
    return monitor.history


def test_a_measurement_has_curves_and_charts_for_each_block() -> None:
    writer = NotingWriter()
    history = run(measure=[GradientSigns()], sink=TensorBoardSink(writer), when=EveryNSteps(n=1), num_steps=3)
    assert not any(record.failed for record in history)
    own = {tag for tag in writer.tags["scalars"] if "signs" in tag}
    assert own == {
        "curvature/signs_probes",
        "curvature/signs_blocks",
        "curvature_signs_positive/00",
        "curvature_signs_positive/02",
        *(f"curvature_signs_over_blocks/size_{which}" for which in ("min", "median", "max")),
    }
    assert writer.tags["figures"] == {"curvature_signs_positive/heat_map"}
    assert writer.tags["histograms"] == {"curvature_signs_spectrum/00_squares", "curvature_signs_spectrum/02_squares"}


def test_a_measurements_state_is_carried_from_probe_to_probe() -> None:
    history = run(measure=[GradientSigns()], sink=Lines(), when=EveryNSteps(n=1), num_steps=3)
    totals = [record for record in history if record.measurement == "signs" and record.block is None]
    assert [record.scalars["probes"] for record in totals] == [1.0, 2.0, 3.0]


def test_a_sink_is_given_the_records_of_each_probe() -> None:
    lines = Lines()
    run(measure=[GradientSigns()], sink=lines, when=EveryNSteps(n=2), num_steps=5)
    assert lines.lines == ["0: probe signs", "2: probe signs", "4: probe signs"]


def test_a_schedule_decides_the_steps() -> None:
    history = run(measure=[GradientSigns()], sink=Lines(), when=WhenSquare(), num_steps=12)
    assert [record.step for record in history if record.measurement == "probe"] == [0, 1, 4, 9]
