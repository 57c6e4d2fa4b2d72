"""What TensorBoard is given of a measurement: a monitor run with a writer that notes tags."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from curvature_callbacks import CurvatureMonitor
from curvature_callbacks.sinks.tensorboard import TensorBoardSink
from tests.contracts.measurement_cases import VARIANTS


class NotingWriter:
    """The methods of a `SummaryWriter` that a sink calls; `tags` holds the tags by the method that wrote them.

    `figures` holds what was drawn: tag, step and figure, in order.
    """

    def __init__(self) -> None:
        self.tags: dict[str, set[str]] = defaultdict(set)
        self.figures: list[tuple[str, int, Any]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.tags["scalars"].add(tag)

    def add_histogram(self, tag: str, values: Any, step: int) -> None:
        self.tags["histograms"].add(tag)

    def add_figure(self, tag: str, figure: Any, step: int, *, close: bool) -> None:
        self.tags["figures"].add(tag)
        self.figures.append((tag, step, figure))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.tags["texts"].add(tag)

    def flush(self) -> None:
        """Nothing is held back."""


def small_classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def written_tags(measurement: Any, *, model: nn.Module | None = None, probes: int = 2) -> dict[str, set[str]]:
    """Tags by kind of summary, without those of the probe itself, of so many probes of the same rows and parameters."""
    model, writer = small_classifier() if model is None else model, NotingWriter()
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    monitor = CurvatureMonitor(
        model,
        probes=[batch],
        loss="cross_entropy",
        measure=[measurement],
        when=1,
        sinks=[TensorBoardSink(writer)],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    for step in range(probes):
        assert not any(record.failed for record in monitor.step(step))
    return {summary: {tag for tag in tags if not _is_of_the_probe(tag)} for summary, tags in writer.tags.items()}


def tags_by_measurement() -> dict[str, dict[str, str]]:
    """Measurement name to kind of summary to its tags, in one string, over all variants of that name."""
    written: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for measurement in VARIANTS:
        for summary, tags in written_tags(measurement).items():
            written[measurement.name][summary] |= tags
    return {
        name: {summary: " ".join(sorted(written[name][summary])) for summary in sorted(written[name])}
        for name in sorted(written)
    }


def _is_of_the_probe(tag: str) -> bool:
    return tag.startswith("curvature_probe/") or tag in ("curvature/failed", "curvature/probe_seconds")
