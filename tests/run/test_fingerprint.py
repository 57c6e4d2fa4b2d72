"""A checkpoint's state is used by the arguments that wrote it, and others are told what differs."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from curvature_callbacks import FisherSpectrum, TopEigenpairs
from curvature_callbacks.run.fingerprint import fingerprint, settings_text, warn_of_change
from tests.training_cases import reports


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


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_another_fingerprint(name: str) -> None:
    assert fingerprint(settings_text(USUAL | CHANGES[name])) != fingerprint(settings_text(USUAL))
    assert fingerprint(settings_text(USUAL | CHANGES[name])) == fingerprint(settings_text(USUAL | CHANGES[name]))


def test_it_survives_json_and_has_no_address() -> None:
    description = settings_text(USUAL | CHANGES["function"])
    assert json.loads(json.dumps(description)) == description
    assert "0x" not in str(description)


def test_it_is_the_same_in_another_process() -> None:
    code = (
        "import os\nfrom curvature_callbacks import TopEigenpairs\nfrom curvature_callbacks.run.fingerprint import *\n"
        "print(fingerprint(settings_text({'measure': [TopEigenpairs(operator=os.path.join)], 'params_filter': os.path.join})))"
    )
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    here: Any = os.path.join
    assert found == {fingerprint(settings_text({"measure": [TopEigenpairs(operator=here)], "params_filter": here})) + "\n"}


def test_what_changed_is_said_once_against_the_nearest(caplog: Any) -> None:
    states = [
        {"settings": settings_text(USUAL | CHANGES["seed"])},
        {"settings": settings_text(USUAL | CHANGES["seed"] | CHANGES["blocks"])},
    ]
    warn_of_change(settings_text(USUAL), [*states, {}, None, 3])
    assert len(reports(caplog)) == 1
    assert "(`seed` 1, now 0)" in reports(caplog)[0]


def test_nothing_is_said_of_a_checkpoint_without_our_state(caplog: Any) -> None:
    warn_of_change(settings_text(USUAL), [{}, {"previous": 3}])
    assert reports(caplog) == []
