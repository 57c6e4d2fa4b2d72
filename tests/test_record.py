"""Records: JSON that loses nothing, tags every logger accepts."""

import json
import math
import pickle
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from curvature_callbacks import Record
from curvature_callbacks.record import PROBE, VERSION, charts, headline, in_progress_bar, metric_tag, scalar_tags, tag_segment
from tests.training_cases import assert_equal

TAGS = Path(__file__).parent / "data" / "tensorboard_tags.json"
VERSION_0 = Path(__file__).parent / "data" / "records_version_0.jsonl"  # of release 0.1.0


def record(**changes: Any) -> Record:
    return Record(**({"step": 3, "measurement": "hessian"} | changes))


SPECIMENS = {
    "empty": record(),
    "full": record(
        block="h.0",
        scalars={"lambda_max": 1.5, "tiny": 5e-324, "third": 1 / 3},
        arrays={"eigenvalues": [1.0, 1e-30, -2.5]},
        seconds=0.25,
        num_matvecs=7,
        metadata={"which": "BE", "uncovered": {"a": "why"}, "list": [1, None, True], "name": "ü\u2028\n"},
        headline=("lambda_max",),
        curves=("third", "tiny"),
        untagged=("lambda_max",),
        ranked_by="tiny",
        charts={"eigenvalues": "histogram"},
    ),
    "nothing drawn": record(headline=(), curves=(), charts={}, arrays={"eigenvalues": [1.0]}),
    "failed": record(error='RuntimeError: "quoted"\nsecond line\u2028 end'),
    "non-finite": record(
        scalars={"a": math.inf, "b": -math.inf, "c": math.nan}, arrays={"eigenvalues": [math.nan, math.inf, -math.inf, 0.0]}
    ),
    "empty spectrum": record(arrays={"eigenvalues": []}),
}


@pytest.mark.parametrize("name", SPECIMENS)
def test_json_round_trip(name: str) -> None:
    line = SPECIMENS[name].to_json()
    back = Record.from_json(line)
    assert "\n" not in line
    assert back.to_json() == line
    for field in fields(Record):
        assert_equal(getattr(back, field.name), getattr(SPECIMENS[name], field.name), field.name)


@pytest.mark.parametrize("name", SPECIMENS)
def test_json_is_strict(name: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(SPECIMENS[name].to_json(), parse_constant=refuse)["step"] == SPECIMENS[name].step


def test_tuples_and_non_finite_metadata_are_written_too() -> None:
    line = record(metadata={"pair": (1, 2), "nested": {"error": math.inf}, 3: "key"}).to_json()
    assert json.loads(line)["metadata"] == {"pair": [1, 2], "nested": {"error": "inf"}, "3": "key"}


def test_failed_means_an_error() -> None:
    assert record(error="").failed
    assert not record().failed


def test_whole_model_values_and_block_curves_have_tags_of_their_own() -> None:
    records = [
        record(measurement=PROBE, scalars={"probe_seconds": 0.5}),
        record(scalars={"lambda_max": 2.0}),
        record(measurement="empirical_fisher", block="h.3", scalars={"trace": 4.0}),
        record(measurement="kfac_empirical_expand", block="h.3.mlp", scalars={"kfac_cosine": 0.5}),
    ]
    assert scalar_tags(records) == {
        "curvature/probe_seconds": 0.5,
        "curvature/hessian_lambda_max": 2.0,
        "curvature_empirical_fisher_trace/h_03": 4.0,
        "curvature_kfac_empirical_expand_kfac_cosine/h_03_mlp": 0.5,
    }


def test_other_block_metrics_are_aggregated() -> None:
    records = [record(block=f"h.{i}", scalars={"rank": float(value)}) for i, value in enumerate([3, 9, 1, 4])]
    group = "curvature_hessian_over_blocks"
    assert scalar_tags(records) == {f"{group}/rank_min": 1.0, f"{group}/rank_median": 3.5, f"{group}/rank_max": 9.0}


def test_what_is_no_headline_has_a_group_of_its_own() -> None:
    scalars = {"full_trace": 1.0, "full_rank": 2.0, "full_num_samples": 3.0}
    tags = scalar_tags([record(measurement="empirical_fisher", scalars=scalars, headline=("full_trace",))])
    assert tags == {"curvature/empirical_fisher_full_trace": 1.0, "curvature_empirical_fisher/full_rank": 2.0}


def test_non_finite_values_have_no_tag() -> None:
    values = {"lambda_max": math.nan, "rank": math.inf, "trace": -math.inf}
    assert scalar_tags([record(scalars=values), record(block="b", scalars=values)]) == {}
    assert scalar_tags([SPECIMENS["failed"], SPECIMENS["empty"]]) == {}


def test_headline_is_a_part_of_the_tags_and_small() -> None:
    records = [
        record(
            scalars={"lambda_max": 2.0, "lambda_min": -1.0, "other": 4.0, "residual_max": math.nan},
            headline=("lambda_max", "lambda_min", "residual_max", "absent"),
        ),
        record(measurement=PROBE, scalars={"failed": 0.0}),
        record(measurement="empirical_fisher", block="b", scalars={"trace": 1.0}),
    ]
    assert headline(records) == {
        "curvature/hessian_lambda_max": 2.0,
        "curvature/hessian_lambda_min": -1.0,
        "curvature/failed": 0.0,
    }


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        ("model.layers.3.self_attn", "model_layers_03_self_attn"),
        ("h.12.mlp", "h_12_mlp"),
        ("layer1.0", "layer1_00"),
        ("a/b c:d", "a_b_c_d"),
        ("0", "00"),
    ],
)
def test_tag_segments_are_what_every_logger_accepts(name: str, segment: str) -> None:
    assert tag_segment(name) == segment
    assert re.fullmatch(r"[A-Za-z0-9_]+", tag_segment(name))


def test_tags_of_blocks_sort_in_the_order_of_the_model() -> None:
    tags = [metric_tag(record(block=f"h.{i}"), "trace") for i in range(12)]
    assert tags == sorted(tags)


def line_without(*keys: str, **more: Any) -> str:
    written = json.loads(SPECIMENS["full"].to_json())
    return json.dumps({key: value for key, value in written.items() if key not in keys} | more)


def test_a_line_says_its_version() -> None:
    assert json.loads(record().to_json())["version"] == VERSION


def test_keys_of_a_later_version_are_ignored() -> None:
    assert Record.from_json(line_without(version=VERSION + 1, colour="red", nested={"a": [1]})) == SPECIMENS["full"]


def test_missing_keys_have_their_defaults() -> None:
    optional = [field.name for field in fields(Record) if field.name not in ("step", "measurement")]
    assert Record.from_json(line_without("version", *optional)) == record()
    assert Record.from_json(line_without(**dict.fromkeys(optional))) == record()  # null is as good as missing


@pytest.mark.parametrize("key", ["step", "measurement"])
def test_a_line_that_is_of_no_step_or_measurement_is_refused(key: str) -> None:
    with pytest.raises(TypeError, match=key):
        Record.from_json(line_without(key))


def test_lines_of_version_0_are_read_and_drawn_as_before() -> None:
    lines = VERSION_0.read_text(encoding="utf-8").splitlines()
    records = [Record.from_json(line) for line in lines]
    for line, read in zip(lines, records, strict=True):
        before, now = json.loads(line), json.loads(read.to_json())
        assert before.items() <= now.items()
        added = dict.fromkeys(("curves", "untagged", "ranked_by", "charts"))
        assert {key: now[key] for key in now.keys() - before.keys()} == {"version": VERSION} | added
    tags = json.loads(TAGS.read_text())
    for name in ("empirical_fisher", "hessian_density", "kfac_empirical_expand"):
        measured = [read for read in records if read.measurement == name]
        assert set(scalar_tags(measured)) == set(tags[name]["scalars"].split()) - {f"curvature_{name}/num_clipped"}
        assert any(charts(read) for read in measured) == (name != "kfac_empirical_expand")
    assert not any(charts(read) for read in records if read.measurement == "hessian")  # a few pairs are no spectrum


def test_a_record_names_the_curves_of_its_block() -> None:
    records = [record(block=block, scalars={"norm": 2.0, "trace": 4.0}, curves=("norm",)) for block in ("a", "b")]
    assert scalar_tags(records) == {
        "curvature_hessian_norm/a": 2.0,
        "curvature_hessian_norm/b": 2.0,
        **{f"curvature_hessian_over_blocks/trace_{which}": 4.0 for which in ("min", "median", "max")},
    }


def test_a_record_names_the_metrics_without_a_tag() -> None:
    scalars = {"norm": 2.0, "num_rows": 8.0, "num_samples": 4.0}
    assert scalar_tags([record(scalars=scalars, untagged=("num_rows",))]) == {
        "curvature/hessian_norm": 2.0,
        "curvature/hessian_num_samples": 4.0,
    }


def test_a_progress_bar_shows_the_largest_eigenvalues_of_the_headline() -> None:
    scalars = {"lambda_max": 2.0, "trace": 3.0, "full_lambda_max": 4.0}
    assert in_progress_bar([record(scalars=scalars, headline=("lambda_max", "trace"))]) == {"curvature/hessian_lambda_max": 2.0}


def test_a_record_names_the_charts_of_its_arrays() -> None:
    arrays = {"eigenvalues": [2.0, 1.0], "weights": [1.0, 3.0]}
    assert charts(record(arrays=arrays)) == {"eigenvalues": "histogram"}
    assert charts(record(arrays=arrays | {"residuals": [0.1, 0.1]})) == {}
    assert charts(record(arrays=arrays, charts={})) == {}
    assert charts(record(arrays=arrays, charts={"weights": "histogram", "absent": "density"})) == {"weights": "histogram"}


def test_pickles_of_version_0_are_read() -> None:
    eigenpairs, failure = pickle.loads(VERSION_0.with_suffix(".pickle").read_bytes())
    assert eigenpairs == Record(
        step=3,
        measurement="hessian",
        block="layer_0",
        scalars={"lambda_max": 2.5},
        headline=("lambda_max",),
        arrays={"eigenvalues": [2.5, 1.0]},
        seconds=0.5,
        num_matvecs=7,
        metadata={"seed": 1},
    )
    assert failure == Record(step=4, measurement="kfac_coverage", error="why")


def test_a_record_survives_a_pickle() -> None:
    record = Record(
        step=1, measurement="mine", scalars={"a": 1.0}, curves=("a",), arrays={"x": [1.0]}, charts={"x": "histogram"}
    )
    assert pickle.loads(pickle.dumps(record)) == record
