"""A checkpoint's state is used by the arguments that wrote it, and others are told what differs."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from curvature_callbacks import (
    AtSteps,
    EdgeRatio,
    EveryNSteps,
    FisherSpectrum,
    GradientNoise,
    KFACCoverage,
    KFACQuality,
    LogSpaced,
    SpectralDensity,
    TopEigenpairs,
)
from curvature_callbacks.run import fingerprint as tables
from curvature_callbacks.run.fingerprint import FIELD_TABLES, Added, FieldTable, warn_of_change
from curvature_callbacks.run.settings import Settings
from tests.run.later_releases import record_field, with_default, with_field
from tests.training_cases import Checksum, reports


def kept(name: Any, parameter: Any) -> Any:
    return True


def other(name: Any, parameter: Any) -> Any:
    return False


USUAL: dict[str, Any] = {
    "measure": [FisherSpectrum(), TopEigenpairs(k=2)],
    "seed": 0,
    "params_filter": kept,
    "block_structure": {"a": ["0"]},
}
CHANGES: dict[str, dict[str, Any]] = {
    "option": {"measure": [FisherSpectrum(), TopEigenpairs(k=3)]},
    "order": {"measure": [TopEigenpairs(k=2), FisherSpectrum()]},
    "seed": {"seed": 1},
    "filter": {"params_filter": other},
    "no filter": {"params_filter": None},
    "blocks": {"block_structure": {"a": ["1"]}},
    "function": {"measure": [TopEigenpairs(operator=kept)]},
}


def with_changes(*names: str) -> Settings:
    arguments = dict(USUAL)
    for name in names:
        arguments |= CHANGES[name]
    return Settings(**arguments)


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_another_key(name: str) -> None:
    assert with_changes(name).key != with_changes().key
    assert with_changes(name).key == with_changes(name).key


def test_it_survives_json_and_has_no_address() -> None:
    description = with_changes("function").description
    assert json.loads(json.dumps(description)) == description
    assert "0x" not in str(description)


def test_it_is_the_same_in_another_process() -> None:
    code = (
        "import os\nfrom curvature_callbacks import TopEigenpairs\nfrom curvature_callbacks.run.settings import Settings\n"
        "print(Settings(measure=[TopEigenpairs(operator=os.path.join)], params_filter=os.path.join).key)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # and not that of this process, which is drawn
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    join: Any = os.path.join
    assert run.stdout.strip() == Settings(measure=[TopEigenpairs(operator=join)], params_filter=join).key


def test_what_changed_is_said_once_against_the_nearest(caplog: Any) -> None:
    states = [{"settings": with_changes(*names).description} for names in (["seed"], ["seed", "blocks"])]
    warn_of_change(with_changes().description, [*states, {}, None, 3])
    assert len(reports(caplog)) == 1
    assert "(`seed` 1, now 0)" in reports(caplog)[0]


def test_nothing_is_said_of_a_checkpoint_without_our_state(caplog: Any) -> None:
    warn_of_change(with_changes().description, [{}, {"previous": 3}])
    assert reports(caplog) == []


def test_a_field_that_is_added_leaves_the_key_until_it_is_used(monkeypatch: Any) -> None:
    before = Settings(measure=[GradientNoise(decay=0.8)]).key
    record_field(monkeypatch, GradientNoise, default=3)
    later = with_field(GradientNoise, default=3)
    assert Settings(measure=[later(decay=0.8)]).key == before
    assert Settings(measure=[later(decay=0.8, added=4)]).key != before
    assert Settings(measure=[later()]).key != before


def test_a_field_that_is_not_recorded_is_refused() -> None:
    """Else its default of now would be taken, and a later one would not count as a difference."""
    with pytest.raises(LookupError, match="lacks \\['added'\\] of `GradientNoise`"):
        _ = Settings(measure=[with_field(GradientNoise, default=3)()]).key


def test_later_fields_are_written_in_the_order_they_came(monkeypatch: Any) -> None:
    """The order of the class does not count: there `decay` is the first."""
    table = FieldTable((), {"decay": Added(version=3, default=0.9), "added": Added(version=2, default=3)})
    monkeypatch.setattr(tables, "FIELD_TABLES", {**FIELD_TABLES, "GradientNoise": table})
    measurement = with_field(GradientNoise, default=3)(decay=0.8, added=4)
    assert "GradientNoise(added=4, decay=0.8)" in Settings(measure=[measurement]).description["measure"]


def test_a_default_that_changes_after_it_was_recorded_is_a_difference(monkeypatch: Any) -> None:
    """What counts is the default that the field came with: 3, also where the class has 5 by then."""
    before = Settings(measure=[GradientNoise()]).key
    record_field(monkeypatch, GradientNoise, default=3)
    assert Settings(measure=[with_field(GradientNoise, default=3)()]).key == before
    later = with_field(GradientNoise, default=5)
    assert Settings(measure=[later()]).key != before
    assert Settings(measure=[later(added=3)]).key == before


def test_a_default_of_the_first_version_that_changes_is_a_difference() -> None:
    later, before = with_default(GradientNoise, decay=0.8), Settings(measure=[GradientNoise()]).key
    assert Settings(measure=[later()]).key != before
    assert Settings(measure=[later(decay=0.9)]).key == before


CLASSES = [
    Settings,
    *(FisherSpectrum, TopEigenpairs, SpectralDensity, EdgeRatio, GradientNoise, KFACQuality, KFACCoverage),
    *(EveryNSteps, AtSteps, LogSpaced),
]


@pytest.mark.parametrize("cls", CLASSES, ids=[cls.__name__ for cls in CLASSES])
def test_every_field_stands_in_its_table(cls: Any) -> None:
    """A field that is new is written into its table with the default it comes with."""
    table = FIELD_TABLES[cls.__name__]
    assert {each.name for each in dataclasses.fields(cls)} == {*table.first, *table.added, *table.ignored}
    assert all(added.version > 1 for added in table.added.values())


def test_a_measurement_of_ones_own_is_written_out_whatever_its_name() -> None:
    mine = dataclasses.make_dataclass("GradientNoise", [("scale", float, 1.0)], bases=(Checksum,), frozen=True)
    assert "scale=1.0" in Settings(measure=[mine()]).description["measure"]
