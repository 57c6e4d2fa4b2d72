"""FisherType: names, and options that cannot be meant."""

from typing import Any

import pytest

from curvature_callbacks import ConfigurationError
from curvature_callbacks.model.loss.fisher_type import FisherType
from tests.model.loss.surrogate_cases import TYPES


def test_all_types_have_names_of_their_own():
    names = [FisherType(fisher=fisher, sample_unit=unit).name for fisher, unit in TYPES]
    assert names == [
        "empirical_fisher",
        "empirical_fisher_token",
        "sampled_fisher",
        "sampled_fisher_token",
        "exact_fisher",
        "exact_fisher_token",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "true"}, "`fisher` must be one of 'empirical', 'sampled', 'exact'"),
        ({"sample_unit": "row"}, "`sample_unit` must be one of 'sequence', 'token'"),
        ({"fisher": "sampled", "num_draws": 0}, "`num_draws`"),
        ({"num_targets": 1.5}, "`num_targets`"),
        ({"fisher": "exact", "num_draws": 2}, "draws no labels"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        FisherType(**options)
