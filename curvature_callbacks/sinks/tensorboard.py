"""Records in TensorBoard: curves, a heat map and a histogram over blocks, a table of the worst ones."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, final

import torch
from typing_extensions import override

from curvature_callbacks._optional import is_available
from curvature_callbacks.record import Record, block_curves, charts, metric_tag, ranking, scalar_tags, tag_segment
from curvature_callbacks.sinks.base import Sink

_REDRAW: Final = 1.5  # growth after which a heat map is drawn again: each takes 0.1 s, as long as a small probe
_WORST: Final = 10  # rows of a table of worst blocks


@final
class TensorBoardSink(Sink):
    """Writes to the user's own `SummaryWriter`; a second writer in its directory would hide the first one's curves.

    Scalars as in `record.scalar_tags`; for the metrics with a curve a block `curvature_<measurement>_<metric>/heat_map`, block
    against step (needs matplotlib; drawn again when it has grown by half); of the arrays that the record's `charts` name
    `curvature_<measurement>_spectrum/<block>`, a histogram of log10 eigenvalues, and `curvature_<measurement>/density`, a
    spectral density with two standard errors as a band (needs matplotlib); `curvature/worst_blocks` (by the metric
    they are `ranked_by`) and `curvature/errors`, text. Non-finite values are not written.

    Args:
        writer: `torch.utils.tensorboard.SummaryWriter`, or what has its methods.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._maps: dict[str, dict[int, dict[str, float]]] = {}
        self._drawn: dict[str, int] = {}  # columns of each map when it was drawn last

    @override
    def write(self, records: Sequence[Record]) -> None:
        if not records:
            return
        step = records[0].step
        for tag, value in scalar_tags(records).items():
            self._writer.add_scalar(tag, value, step)
        for record in records:
            self._write_charts(record, step)
        self._write_heat_maps(records, step)
        self._write_texts(records, step)
        self._writer.flush()

    def _write_charts(self, record: Record, step: int) -> None:
        for name, chart in charts(record).items():
            if chart == "histogram":
                self._write_histogram(record, name, step)
            elif chart == "density":
                self._write_density(record, name, step)

    def _write_histogram(self, record: Record, name: str, step: int) -> None:
        exponents = [math.log10(value) for value in record.arrays[name] if 0 < value < math.inf]
        if len(exponents) == len(record.arrays[name]) > 1:
            tag = f"curvature_{tag_segment(record.measurement)}_spectrum/{tag_segment(_spectrum_of(record, name))}"
            self._writer.add_histogram(tag, torch.tensor(exponents), step)

    def _write_density(self, record: Record, name: str, step: int) -> None:
        grid, errors = record.arrays.get("grid"), record.arrays.get(f"{name}_standard_error")
        if grid is not None and errors is not None and is_available("matplotlib"):
            tag = metric_tag(replace(record, headline=()), name)
            self._writer.add_figure(tag, _curve(grid, record.arrays[name], errors), step, close=True)

    def _write_heat_maps(self, records: Sequence[Record], step: int) -> None:
        if not is_available("matplotlib"):
            return
        touched = set()
        for record in records:
            if record.block is not None:
                for metric in block_curves(record):
                    value = record.scalars.get(metric, math.nan)
                    if 0 < value < math.inf:
                        tag = metric_tag(record, metric).partition("/")[0]
                        self._maps.setdefault(tag, {}).setdefault(step, {})[record.block] = value
                        touched.add(tag)
        for tag in sorted(touched):
            if len(self._maps[tag]) >= _REDRAW * self._drawn.get(tag, 0):
                self._drawn[tag] = len(self._maps[tag])
                self._writer.add_figure(f"{tag}/heat_map", _heat_map(self._maps[tag]), step, close=True)

    def _write_texts(self, records: Sequence[Record], step: int) -> None:
        ranked = sorted(
            (record for record in records if ranking(record) in record.scalars and record.block is not None),
            key=lambda record: -record.scalars[ranking(record)],
        )
        if ranked:
            names = dict.fromkeys(record.measurement for record in records)
            groups = [[record for record in ranked if record.measurement == name][:_WORST] for name in names]
            self._writer.add_text("curvature/worst_blocks", "\n\n".join(_table(group) for group in groups if group), step)
        errors = [f"`{record.measurement}`: {record.error}" for record in records if record.error]
        if errors:
            self._writer.add_text("curvature/errors", "\n\n".join(errors), step)


def _spectrum_of(record: Record, array: str) -> str:
    """What a histogram is of: a block, a part of the model, or another array of theirs."""
    if record.block is None:
        return array.removesuffix("_eigenvalues")
    return record.block if array == "eigenvalues" else f"{record.block}.{array}"


def _table(records: Sequence[Record]) -> str:
    metrics = dict.fromkeys((ranking(records[0]), *block_curves(records[0])))
    columns = [metric for metric in metrics if metric in records[0].scalars]
    header = f"| block ({records[0].measurement}) | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns)
    rows = [
        f"| `{record.block}` | " + " | ".join(f"{record.scalars.get(name, math.nan):.3g}" for name in columns) + " |"
        for record in records
    ]
    return "\n".join([header, *rows])


def _curve(grid: Sequence[float], density: Sequence[float], errors: Sequence[float]) -> Any:
    """log10 of a density with two standard errors on either side; what is below 1e-6 of its largest value is cut off."""
    from matplotlib.figure import Figure  # as in `_heat_map`

    floor = 1e-6 * max(density)
    low, high = (
        [max(value + sign * error, floor) for value, error in zip(density, errors, strict=True)] for sign in (-2.0, 2.0)
    )
    figure = Figure(figsize=(5.0, 3.0))
    figure.subplots_adjust(left=0.15, right=0.97, bottom=0.17, top=0.95)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.fill_between(grid, low, high, alpha=0.3)
    axes.plot(grid, [max(value, floor) for value in density])
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    return figure


def _heat_map(values: dict[int, dict[str, float]]) -> Any:
    """log10 of the values, a row a block and a column a step."""
    from matplotlib.figure import Figure  # not pyplot: its global state belongs to the user

    steps = sorted(values)
    blocks = list(dict.fromkeys(block for step in steps for block in values[step]))
    grid = [[math.log10(values[step].get(block, math.nan)) for step in steps] for block in blocks]
    width, height = 5.0, 1.2 + 0.3 * len(blocks)
    figure = Figure(figsize=(width, height))
    # Margins by hand: Matplotlib's own layout engines draw everything twice, and drawing is all the time this takes.
    left = min(0.3 + 0.09 * max(map(len, blocks)), 0.6 * width) / width
    figure.subplots_adjust(left=left, right=1.0, bottom=0.6 / height, top=1.0 - 0.15 / height)
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, label="log10")
    shown = range(0, len(steps), max(1, len(steps) // 5))
    axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
    axes.set_yticks(range(len(blocks)), blocks, fontsize=11)
    axes.set_xlabel("step")
    return figure
