"""What arrives in a TensorBoard event file, read back from it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from curvature_callbacks import Record
from curvature_callbacks.sinks import tensorboard
from curvature_callbacks.sinks.tensorboard import TensorBoardSink
from tests.sinks.tag_cases import NotingWriter


def block(name: str, step: int = 0, *, condition: float = 10.0, eigenvalues: Sequence[float] = (1.0, 0.1)) -> Record:
    return Record(
        step=step,
        measurement="empirical_fisher",
        block=name,
        scalars={"condition_number": condition, "lambda_max": 2.0},
        arrays={"eigenvalues": list(eigenvalues)},
    )


def figures_of(*probes: list[Record]) -> list[tuple[str, int, Any]]:
    """Tag, step and figure of all that is drawn."""
    writer = NotingWriter()
    sink = TensorBoardSink(writer)
    for records in probes:
        sink.write(records)
    return writer.figures


def exponents(axes: Any) -> list[list[float]]:
    """The log10 values of a heat map."""
    return axes.images[0].get_array().tolist()


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Any]:
    """A function that writes probes and gives what is then in the file."""
    writer = SummaryWriter(str(tmp_path))

    def write(*probes: list[Record]) -> EventAccumulator:
        sink = TensorBoardSink(writer)
        for records in probes:
            sink.write(records)
        accumulator = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "images": 0})
        accumulator.Reload()
        return accumulator

    yield write
    writer.close()


def test_scalars_stand_at_the_step_of_their_record(written: Any) -> None:
    probes = [[Record(step=step, measurement="hessian", scalars={"lambda_max": step + 0.5})] for step in (0, 40, 80)]
    events = written(*probes).Scalars("curvature/hessian_lambda_max")
    assert [(event.step, event.value) for event in events] == [(0, 0.5), (40, 40.5), (80, 80.5)]


def test_spectra_become_histograms_of_exponents(written: Any) -> None:
    events = written([block("h.0", eigenvalues=[100.0, 1.0, 0.01])])
    (event,) = events.Histograms("curvature_empirical_fisher_spectrum/h_00")
    value = event.histogram_value
    assert (value.num, value.min, value.max, value.sum) == (3.0, -2.0, 2.0, 0.0)


def test_spectra_that_have_no_logarithm_are_left_out(written: Any) -> None:
    records = [block("zero", eigenvalues=[1.0, 0.0]), block("negative", eigenvalues=[1.0, -1.0])]
    records += [block("nan", eigenvalues=[1.0, math.nan]), block("inf", eigenvalues=[math.inf, 1.0])]
    assert written(records).Tags()["histograms"] == []


def test_heat_maps_grow_by_a_column_a_probe(written: Any) -> None:
    tag = "curvature_empirical_fisher_condition_number/heat_map"
    probes = [block("a"), block("b", condition=100.0)], [block("a", step=5), block("b", step=5)]
    assert [event.step for event in written(*probes).Images(tag)] == [0, 5]
    first, second = (figure.axes[0] for drawn, _, figure in figures_of(*probes) if drawn == tag)
    assert exponents(first) == [[1.0], [2.0]]
    assert exponents(second) == [[1.0, 1.0], [2.0, 1.0]]  # a row a block, a column a step
    assert [label.get_text() for label in second.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["0", "5"]


def test_heat_maps_are_drawn_again_when_they_have_grown_by_half(written: Any) -> None:
    events = written(*([block("a", step=step)] for step in range(12)))
    steps = [event.step for event in events.Images("curvature_empirical_fisher_lambda_max/heat_map")]
    assert len(events.Scalars("curvature_empirical_fisher_lambda_max/a")) == 12
    assert steps == [0, 1, 2, 4, 7, 11]


def test_the_worst_blocks_come_first_and_there_are_ten(written: Any) -> None:
    records = [block(f"h.{i}", condition=float(i + 1)) for i in range(12)]
    (event,) = written(records).Tensors("curvature/worst_blocks/text_summary")
    table = event.tensor_proto.string_val[0].decode().splitlines()
    assert len(table) == 2 + 10
    assert table[2].startswith("| `h.11` | 12 ")
    assert table[-1].startswith("| `h.2` |")


def test_the_worst_blocks_are_those_of_the_metric_a_record_names(written: Any) -> None:
    norms = {"a": 1.0, "b": 3.0, "c": 2.0}
    records = [
        Record(step=0, measurement="norms", block=name, scalars={"norm": norm}, curves=("norm",), ranked_by="norm")
        for name, norm in norms.items()
    ]
    (event,) = written(records).Tensors("curvature/worst_blocks/text_summary")
    table = event.tensor_proto.string_val[0].decode().splitlines()
    assert table[0] == "| block (norms) | norm |"
    assert [row.split("`")[1] for row in table[2:]] == ["b", "c", "a"]


def test_every_measurement_has_a_table_of_its_own(written: Any) -> None:
    records = [block("h.0", condition=2.0), block("h.1", condition=9.0)]
    records += [replace(record, measurement="sampled_fisher") for record in records]
    records += [Record(step=0, measurement="kfac", block="h.0.mlp", scalars={"kfac_cosine": 0.5})]
    (event,) = written(records).Tensors("curvature/worst_blocks/text_summary")
    first, second = event.tensor_proto.string_val[0].decode().split("\n\n")
    for table, name in ((first, records[0].measurement), (second, "sampled_fisher")):
        header, _, *rows = table.splitlines()
        assert f"block ({name})" in header
        assert "kfac_cosine" not in header
        assert [row.split("`")[1] for row in rows] == ["h.1", "h.0"]


def test_the_largest_few_eigenvalues_are_no_spectrum(written: Any) -> None:
    record = Record(step=0, measurement="kfac", block="a", arrays={"product_eigenvalues": [2.0, 1.0]})
    assert written([record]).Tags()["histograms"] == []


def test_errors_are_written_as_text(written: Any) -> None:
    (event,) = written([Record(step=1, measurement="hessian", error="ProbeError: the loss is nan")]).Tensors(
        "curvature/errors/text_summary"
    )
    assert event.tensor_proto.string_val[0].decode() == "`hessian`: ProbeError: the loss is nan"


def test_non_finite_values_are_not_written(written: Any) -> None:
    records = [Record(step=0, measurement="hessian", scalars={"lambda_max": math.nan, "lambda_min": -math.inf})]
    tags = written([*records, block("a", condition=math.inf)]).Tags()
    assert tags["scalars"] == ["curvature_empirical_fisher_lambda_max/a"]
    assert tags["images"] == ["curvature_empirical_fisher_lambda_max/heat_map"]


def test_an_empty_probe_writes_nothing(written: Any) -> None:
    tags = written([]).Tags()
    assert not any(tags[summary] for summary in ("scalars", "images", "histograms", "tensors"))


def test_without_matplotlib_everything_but_pictures_is_written(written: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tensorboard, "is_available", lambda package: package != "matplotlib")
    tags = written([block("a")]).Tags()
    assert tags["images"] == []
    assert tags["histograms"]
    assert tags["scalars"]


def test_matplotlibs_global_figures_are_left_to_the_user(written: Any, monkeypatch: Any) -> None:
    from matplotlib import pyplot

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pyplot was used")

    users = pyplot.figure()
    for name in ("figure", "subplots"):
        monkeypatch.setattr(pyplot, name, forbidden)
    assert written([block("a")]).Tags()["images"]
    assert pyplot.get_fignums() == [users.number]
    pyplot.close(users)


def test_writing_uses_no_global_generator(written: Any) -> None:
    before = torch.get_rng_state()
    written([block("a"), block("b")])
    assert torch.equal(before, torch.get_rng_state())


def test_a_spectral_density_becomes_a_figure(written: Any) -> None:
    arrays = {"grid": [-1.0, 0.0, 1.0], "density": [0.0, 2.0, 0.1], "density_standard_error": [0.0, 1.5, 0.1]}
    record = Record(step=4, measurement="hessian_density", scalars={"trace": 1.0}, headline=("trace",), arrays=arrays)
    incomplete = replace(record, measurement="other", arrays={"grid": [0.0], "density": [1.0]})
    events = written([record, incomplete])
    assert events.Tags()["images"] == ["curvature_hessian_density/density"]
    assert [image.step for image in events.Images("curvature_hessian_density/density")] == [4]


def test_a_density_is_drawn_with_a_band_of_two_standard_errors() -> None:
    arrays = {"grid": [0.0, 1.0], "density": [1.0, 2.0], "density_standard_error": [0.25, 0.5]}
    ((_, _, figure),) = figures_of([Record(step=4, measurement="hessian_density", arrays=arrays)])
    (axes,) = figure.axes
    assert axes.lines[0].get_ydata().tolist() == [1.0, 2.0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in corners.tolist()} == {(0.0, 0.5), (1.0, 1.0), (1.0, 3.0), (0.0, 1.5)}
