"""Record: what one measurement found about one block (or the whole model) at one step."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, final

PROBE: Final = "probe"  # the record each probe writes about itself: seconds, failures
BLOCK_CURVES: Final = (
    "condition_number",
    "lambda_max",
    "effective_rank",
    "trace",
)  # one curve a block; others aggregated


_HEADLINE: Final = (
    "curvature/hessian_lambda_max",
    "curvature/hessian_lambda_min",
    "curvature/hessian_residual_max",
    "curvature/hessian_ritz_negative_mass",
    "curvature/empirical_fisher_full_condition_number",
    "curvature/empirical_fisher_full_lambda_max",
    "curvature/empirical_fisher_full_trace",
    "curvature/kfac_coverage_gradient_energy",
    "curvature/probe_seconds",
    "curvature/failed",
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measurement of one block at one step.

    Attributes:
        step: optimizer steps completed when the parameters were measured.
        measurement: what was measured, with the Fisher type where it is one (`empirical_fisher`, `hessian`, ...).
        block: block name, or None for the whole model.
        scalars: metric name to value; non-finite values are kept here and in JSON, never written as curves.
        arrays: spectra and the like, each a list of floats.
        seconds: wall time of the measurement this record belongs to (shared by all its blocks).
        num_matvecs: operator products of the measurement this record belongs to.
        metadata: conventions and settings (Fisher type, sample unit, N, dtype, seed, ...), JSON-able.
        error: why the measurement failed, or None. A failed measurement has no scalars.
    """

    step: int
    measurement: str
    block: str | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    num_matvecs: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the measurement gave no result."""
        return self.error is not None

    def to_json(self) -> str:
        """One line of strict JSON; non-finite floats become the strings `nan`, `inf` and `-inf`."""
        return json.dumps(_encode(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """The record that `to_json` wrote."""
        fields = json.loads(line)
        fields["scalars"] = {name: float(value) for name, value in fields["scalars"].items()}
        fields["arrays"] = {name: [float(value) for value in values] for name, values in fields["arrays"].items()}
        return cls(**fields)


def scalar_tags(records: Iterable[Record]) -> dict[str, float]:
    """Tag to value for the finite scalars of one probe, few enough to read.

    Whole model: `curvature/<measurement>_<metric>` (the probe's own: `curvature/<metric>`). Of each block the metrics in
    `BLOCK_CURVES`: `curvature_<measurement>_<metric>/<block>`, because TensorBoard groups by the first segment and the usual
    question is *which block*; of the others the minimum, median and maximum over blocks.
    """
    tags: dict[str, float] = {}
    over_blocks: dict[str, list[float]] = {}
    for record in records:
        for metric, value in record.scalars.items():
            if not math.isfinite(value):
                continue
            if record.block is None or metric in BLOCK_CURVES:
                tags[metric_tag(record, metric)] = value
            else:
                over_blocks.setdefault(f"curvature/{tag_segment(f'{record.measurement}_{metric}')}", []).append(value)
    for tag, values in over_blocks.items():
        tags |= {f"{tag}_min": min(values), f"{tag}_median": statistics.median(values), f"{tag}_max": max(values)}
    return tags


def metric_tag(record: Record, metric: str) -> str:
    """The tag under which one metric of `record` is logged."""
    name = metric if record.measurement == PROBE else f"{record.measurement}_{metric}"
    if record.block is None:
        return f"curvature/{tag_segment(name)}"
    return f"curvature_{tag_segment(name)}/{tag_segment(record.block)}"


def headline(records: Iterable[Record]) -> dict[str, float]:
    """The few whole-model numbers for progress bars and training logs, under their tags.

    Non-finite and missing ones are left out.
    """
    tags = scalar_tags(records)
    return {tag: tags[tag] for tag in _HEADLINE if tag in tags}


def tag_segment(name: str) -> str:
    """`name` in `[A-Za-z0-9_]` with numbers zero-padded to two digits, which every logger sorts and accepts.

    Example:
        >>> tag_segment("model.layers.3.self_attn")
        'model_layers_03_self_attn'
    """
    padded = re.sub(r"(?<![A-Za-z0-9])\d(?![A-Za-z0-9])", lambda match: match.group().zfill(2), name)
    return re.sub(r"[^A-Za-z0-9_]+", "_", padded).strip("_")


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value
