"""Options of an eigensolver are the keywords of `lanczos`, checked when the object is made."""

import dataclasses
import inspect
from typing import Any

import pytest

from curvature_callbacks import ConfigurationError, lanczos
from curvature_callbacks.linalg.lanczos.options import LanczosOptions


def test_they_are_the_keywords_of_lanczos_with_their_defaults() -> None:
    keywords = dict(inspect.signature(lanczos).parameters)
    del keywords["operator"], keywords["initial_vectors"]  # which are data
    missing = {dataclasses.MISSING: inspect.Parameter.empty}
    fields = {field.name: missing.get(field.default, field.default) for field in dataclasses.fields(LanczosOptions)}
    assert fields == {name: parameter.default for name, parameter in keywords.items()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "`k` must be an integer of at least 1"),
        ({"k": True}, "`k` must be an integer"),
        ({"which": "SM"}, "`which` must be one of 'LA', 'SA', 'LM', 'BE'"),
        ({"reorth_mode": "half"}, "`reorth_mode` must be one of 'auto', 'full'"),
        ({"max_matvecs": 3}, "`max_matvecs` must be at least `k`=4, got 3"),
        ({"tol": 0.0}, "`tol` must be positive"),
        ({"tol": float("nan")}, "`tol` must be positive"),
        ({"max_seconds": 0.0}, "`max_seconds` must be positive"),
        ({"reorth_window": 0}, "`reorth_window`"),
        ({"reorth_period": 0}, "`reorth_period`"),
        ({"basis_size": 40}, "`basis_size` needs `reorth_mode`='thick_restart'"),
        ({"basis_size": 11, "reorth_mode": "thick_restart"}, r"`basis_size` must be at least `k` \+ 8 = 12, got 11"),
    ],
)
def test_a_bad_option_is_refused_when_the_object_is_made(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LanczosOptions(**({"k": 4} | wrong))


def test_the_default_number_of_products_grows_with_the_pairs() -> None:
    assert LanczosOptions(k=4).most_matvecs == 100
    assert LanczosOptions(k=100).most_matvecs == 220
    assert LanczosOptions(k=4, max_matvecs=7).most_matvecs == 7


def test_only_the_largest_alone_cannot_be_negative_by_wish() -> None:
    asked = {which: LanczosOptions(k=1, which=which).asks_for_negative for which in ("LA", "SA", "LM", "BE")}
    assert asked == {"LA": False, "SA": True, "LM": True, "BE": True}
