"""The tags of every built-in measurement are those that dashboards were built on."""

import json
from pathlib import Path

import pytest

from tests.contracts.measurement_cases import VARIANTS
from tests.sinks.tag_cases import tags_by_measurement

RECORDED = json.loads((Path(__file__).parent.parent / "data" / "tensorboard_tags.json").read_text())  # of version 0.1.0


@pytest.fixture(scope="module")
def written() -> dict[str, dict[str, str]]:
    return tags_by_measurement()


@pytest.mark.parametrize("name", sorted({measurement.name for measurement in VARIANTS}))
def test_the_tags_are_those_recorded(name: str, written: dict[str, dict[str, str]]) -> None:
    assert {summary: tags.split() for summary, tags in written[name].items()} == {
        summary: tags.split() for summary, tags in RECORDED[name].items()
    }
