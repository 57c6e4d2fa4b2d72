"""GramLimits of a Gram's computation: what is refused, and that the numbers are the same within any of them."""

import pytest
import torch

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.gram.context import GramLimits
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.model.loss.fisher_type import FisherType
from tests.cases import CASES
from tests.gram.capture.rule_cases import assert_exact
from tests.gram.gram_cases import parameter_grams
from tests.reference import sample_gradients


def test_grams_that_would_not_fit_are_refused_before_they_are_computed():
    """Six rows and six parameters take 8 x 6 x 6 x 6 bytes."""
    model, microbatches = CASES["mlp"].model(), CASES["mlp"].microbatches((3, 1, 2))
    limit = 8 * 6**2 * len(list(model.parameters()))
    assert parameter_grams(model, microbatches, limits=GramLimits(gram_bytes=limit)).fallback == {}
    with pytest.raises(ConfigurationError, match="6 pseudo-samples of 6 parameters need Grams of 0 GiB"):
        parameter_grams(model, microbatches, limits=GramLimits(gram_bytes=limit - 1))


def test_every_draw_counts_as_a_sample():
    model, microbatches = CASES["mlp"].model(), CASES["mlp"].microbatches((3, 1, 2))
    limits = GramLimits(gram_bytes=8 * 6**2 * len(list(model.parameters())))
    with pytest.raises(ConfigurationError, match="pseudo-samples of 6 parameters need Grams"):
        parameter_grams(model, microbatches, limits=limits, fisher_type=FisherType(fisher="sampled", num_draws=2))


@pytest.mark.parametrize("row_bytes", [1, 8 * 6, 8 * 6 * 7, 1 << 20])
@pytest.mark.parametrize("fisher_type", [FisherType(), FisherType(fisher="sampled", num_draws=2)], ids=["empirical", "sampled"])
def test_gradients_taken_row_by_row_are_held_in_any_number_of_pieces(row_bytes: int, fisher_type: FisherType):
    """From one element of each sample at a time to all at once."""
    model, microbatches = CASES["mlp"].model(), CASES["mlp"].microbatches((3, 1, 2))
    refused = dict.fromkeys((name for name, _ in model.named_parameters()), "for the test")
    options = {"limits": GramLimits(row_bytes=row_bytes), "fisher_type": fisher_type}
    found = parameter_grams(model, microbatches, GramMemory(refused=refused), **options)
    ruled = parameter_grams(model, microbatches, fisher_type=fisher_type)
    assert set(found.fallback) == set(refused)
    for name, K in ruled.grams.items():
        assert torch.allclose(found.grams[name], K, rtol=1e-10, atol=1e-12), name
    if fisher_type == FisherType():
        assert_exact(found, sample_gradients(model, microbatches, CASES["mlp"].kind), model, 1e-10)
