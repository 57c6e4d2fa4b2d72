"""Record: the result of one measurement for one block (or for the model) at one step."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, final

Chart = Literal["histogram", "density"]

PROBE: Final = "probe"  # the record each probe writes about itself: seconds, failures
VERSION: Final = 1  # of JSON lines, raised when a key changes its meaning; the first lines had none

# What is drawn of a record that does not say so: one of version 0, or of a user's measurement.
_USUAL_UNTAGGED: Final = ("num_samples", "full_num_samples", "block_diagonal_num_samples")
_USUAL_RANKING: Final = "condition_number"
_USUAL_CURVES: Final = ("condition_number", "lambda_max", "effective_rank", "trace", "kfac_cosine")
_USUAL_SPECTRA: Final = ("eigenvalues", "full_eigenvalues", "block_diagonal_eigenvalues")


# Pickles of version 0 hold a list of these fields' values, in this order.
_FIELDS_OF_VERSION_0: Final = (
    "step",
    "measurement",
    "block",
    "scalars",
    "headline",
    "arrays",
    "seconds",
    "num_matvecs",
    "metadata",
    "error",
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measurement of one block at one step.

    Attributes:
        step: optimizer steps completed when the parameters were measured.
        measurement: what was measured, with the Fisher type where it is one (`empirical_fisher`, `hessian`, ...).
        block: block name, or None for a model-wide record.
        scalars: metric name to value; non-finite values are kept here and in JSON, never written as curves.
        headline: the metrics that belong on the first page, in progress bars and in training logs; None for all of them.
        curves: of a block's record the metrics drawn as one curve a block, of the others only minimum, median and maximum over
            blocks; None for `condition_number`, `lambda_max`, `effective_rank`, `trace` and `kfac_cosine`.
        untagged: the metrics without a tag, which are constant over a run and stand in the JSON-lines file only; None for
            `num_samples`, `full_num_samples` and `block_diagonal_num_samples`.
        ranked_by: the metric whose largest values make the worst blocks; None for `condition_number`.
        arrays: spectra and the like, each a list of floats.
        charts: array name to its drawing: `histogram` for a full spectrum (of log10, where all of it is positive), `density`
            for values over the array `grid` with the errors `<name>_standard_error`; arrays not named are not drawn. None for a
            `histogram` of `eigenvalues`, `full_eigenvalues`, `block_diagonal_eigenvalues`, unless `residuals` stand beside
            them (then these are a few pairs, no spectrum), and `density`.
        seconds: wall time of the measurement this record belongs to (shared by all its blocks).
        num_matvecs: operator products of the measurement this record belongs to.
        metadata: conventions and settings (Fisher type, sample unit, N, dtype, seed, ...), JSON-able.
        error: why the measurement failed, or None. A failed measurement has no scalars.
    """

    step: int
    measurement: str
    block: str | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)
    headline: tuple[str, ...] | None = None
    curves: tuple[str, ...] | None = None
    untagged: tuple[str, ...] | None = None
    ranked_by: str | None = None
    arrays: Mapping[str, list[float]] = field(default_factory=dict)
    charts: Mapping[str, Chart] | None = None
    seconds: float = 0.0
    num_matvecs: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the measurement gave no result."""
        return self.error is not None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __setstate__(self, state: Mapping[str, Any] | list[Any]) -> None:
        values = dict(zip(_FIELDS_OF_VERSION_0, state, strict=True)) if isinstance(state, list) else state
        record = Record(**values)
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, getattr(record, name))

    def to_json(self) -> str:
        """One line of strict JSON with its `version`; non-finite floats become the strings `nan`, `inf` and `-inf`."""
        return json.dumps({"version": VERSION, **_encode(asdict(self))}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """The record `to_json` wrote, in any version: a missing key takes its default, an unknown one is ignored."""
        written = json.loads(line)
        values = {name: written[name] for name in cls.__dataclass_fields__ if written.get(name) is not None}
        return cls(**{name: _DECODE[name](value) if name in _DECODE else value for name, value in values.items()})


def block_curves(record: Record) -> tuple[str, ...]:
    """The metrics drawn as one curve a block."""
    return _USUAL_CURVES if record.curves is None else record.curves


def ranking(record: Record) -> str:
    """The metric by which blocks are ranked, the worst being the largest."""
    return _USUAL_RANKING if record.ranked_by is None else record.ranked_by


def charts(record: Record) -> Mapping[str, Chart]:
    """Array name to its drawing, for the arrays that `record` has."""
    drawn = _usual_charts(record.arrays) if record.charts is None else record.charts
    return {name: chart for name, chart in drawn.items() if name in record.arrays}


def scalar_tags(records: Iterable[Record]) -> dict[str, float]:
    """Tag to value for the finite scalars of one probe, few enough to read.

    Model-wide: `curvature/<measurement>_<metric>` for the headline, which TensorBoard shows first, `curvature_<measurement>/
    <metric>` for the others. Of each block the record's `curves`: `curvature_<measurement>_<metric>/<block>`, because the usual
    question is *which block*; of the others the minimum, median and maximum over blocks:
    `curvature_<measurement>_over_blocks/<metric>_{min,median,max}`.
    """
    tags: dict[str, float] = {}
    over_blocks: dict[str, list[float]] = {}
    for record in records:
        for metric, value in record.scalars.items():
            if not math.isfinite(value) or metric in _untagged(record):
                continue
            if record.block is None or metric in block_curves(record):
                tags[metric_tag(record, metric)] = value
            else:
                group = f"curvature_{tag_segment(record.measurement)}_over_blocks"
                over_blocks.setdefault(f"{group}/{tag_segment(metric)}", []).append(value)
    for tag, values in over_blocks.items():
        tags |= {f"{tag}_min": min(values), f"{tag}_median": statistics.median(values), f"{tag}_max": max(values)}
    return tags


def headline(records: Iterable[Record]) -> dict[str, float]:
    """Tag to value of the headline metrics, for training logs; non-finite ones are left out."""
    return {
        metric_tag(record, metric): record.scalars[metric]
        for record in records
        for metric in (record.scalars if record.headline is None else record.headline)
        if record.block is None and math.isfinite(record.scalars.get(metric, math.nan))
    }


def in_progress_bar(records: Iterable[Record]) -> dict[str, float]:
    """Of `headline` what a progress bar has room for: the largest eigenvalues."""
    return {tag: value for tag, value in headline(records).items() if tag.endswith("lambda_max")}


def metric_tag(record: Record, metric: str) -> str:
    """The tag under which one metric of `record` is logged."""
    measurement, name = tag_segment(record.measurement), tag_segment(metric)
    if record.block is not None:
        return f"curvature_{measurement}_{name}/{tag_segment(record.block)}"
    if record.headline is not None and metric not in record.headline:
        return f"curvature_{measurement}/{name}"
    return f"curvature/{name}" if record.measurement == PROBE else f"curvature/{measurement}_{name}"


def tag_segment(name: str) -> str:
    """`name` in `[A-Za-z0-9_]` with numbers zero-padded to two digits, which every logger sorts and accepts.

    Example:
        >>> tag_segment("model.layers.3.self_attn")
        'model_layers_03_self_attn'
    """
    padded = re.sub(r"(?<![A-Za-z0-9])\d(?![A-Za-z0-9])", lambda match: match.group().zfill(2), name)
    return re.sub(r"[^A-Za-z0-9_]+", "_", padded).strip("_")


def _untagged(record: Record) -> tuple[str, ...]:
    return _USUAL_UNTAGGED if record.untagged is None else record.untagged


def _usual_charts(arrays: Mapping[str, list[float]]) -> dict[str, Chart]:
    spectra: dict[str, Chart] = {} if "residuals" in arrays else dict.fromkeys(_USUAL_SPECTRA, "histogram")
    return spectra | {"density": "density"}


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _float_lists(arrays: Mapping[str, Any]) -> dict[str, list[float]]:
    return {name: [float(value) for value in values] for name, values in arrays.items()}


_DECODE: Final[Mapping[str, Callable[[Any], Any]]] = {
    "scalars": _floats,
    "arrays": _float_lists,
    "headline": tuple,
    "curves": tuple,
    "untagged": tuple,
}
