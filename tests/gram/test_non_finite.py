"""Rows without a finite gradient in a layout that is not proved yet, and what else a probe may meet only once."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks.compute.kfac_coverage import compute_kfac_coverage
from curvature_callbacks.errors import ProbeError
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.gram.uses.uses import OuterProduct
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.problem import Problem
from tests.cases import CASES, in_general_position, mlp
from tests.gram.capture.rule_cases import RuleCase, assert_exact
from tests.gram.gram_cases import parameter_grams
from tests.reference import sample_gradients


def grams(model: nn.Module, batch: Any, fisher_type: FisherType, loss: Any, **options: Any) -> BlockGrams:
    with isolated(model, seed=0):
        problem = Problem(model, [batch], loss=loss, block_structure="none")
        problem.check()  # as before every run: settles the form of the model's own loss
        return problem.grams(fisher_type, **options)


def regression() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = in_general_position(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))).double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, size, generator=generator, dtype=torch.float64) for size in (3, 1))
    return model, (x, y)


def test_weights_of_an_exact_fisher_stay_zero_beside_a_row_that_is_not_finite():
    model, (x, y) = regression()
    bad = x.clone()
    bad[2] = torch.nan
    kept = torch.tensor([0, 1, 3, 4])
    found = grams(model, (bad, y), FisherType(fisher="exact"), "mse")
    truth = grams(model, (x[kept], y[kept]), FisherType(fisher="exact"), "mse")
    assert found.samples.tolist() == kept.tolist()
    assert not found.weights.any()
    torch.testing.assert_close(found.grams["model"], truth.grams["model"])


def test_pseudo_samples_of_tokens_keep_to_their_rows_beside_one_that_is_not_finite():
    """Two rows are left, with two targets and none: as many pseudo-samples as rows, but both of the first."""
    model = CASES["llama"].model()  # its head is not tied to the embedding
    batch = CASES["llama"].microbatches((3,))[0]
    batch["labels"][:] = -100
    batch["labels"][0, 1:3] = batch["input_ids"][0, 1:3]
    batch["labels"][2, 1:4] = 5
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[10] = torch.nan
        batch["input_ids"][:2] = batch["input_ids"][:2].clamp_max(9)
        batch["input_ids"][2, 0] = 10
    single = {name: value[:1] for name, value in batch.items()}
    fisher_type = FisherType(sample_unit="token")
    found = grams(model, batch, fisher_type, None)
    truth = grams(model, single, fisher_type, None)
    assert found.samples.tolist() == [0, 0]
    torch.testing.assert_close(found.grams["model"], truth.grams["model"])


def test_gradients_whose_products_overflow_fail_the_probe_and_nothing_after_it():
    model, (x, _) = in_general_position(mlp), CASES["mlp"].microbatches((4,))[0]
    scale = [1e22]

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return module(batch[0]).square().sum(1) * scale[0]

    memory = ProbeMemory()
    with isolated(model, seed=0):
        with pytest.raises(ProbeError, match="not finite"):
            Problem(model, [(x.float(), x)], loss=loss, memory=memory).grams()
        assert memory.grams.refused == {}
        scale[0] = 1.0
        assert Problem(model, [(x.float(), x)], loss=loss, memory=memory).grams().fallback == {}


def test_a_batch_that_overflows_goes_row_by_row_at_this_probe_only(monkeypatch: pytest.MonkeyPatch):
    """Gradients of single rows are finite, the rule's product of all rows is not."""
    model, microbatches, memory = CASES["mlp"].model(), CASES["mlp"].microbatches((4,)), GramMemory()
    with monkeypatch.context() as patch:
        original = OuterProduct.factors
        patch.setattr(OuterProduct, "factors", lambda self: tuple(factor * torch.inf for factor in original(self)))
        found = parameter_grams(model, microbatches, memory)
    assert set(found.fallback.values()) == {"not finite in the batch"}
    assert set(found.fallback) == set(dict(model.named_parameters()))
    assert found.failed_certificates == ()
    assert_exact(found, sample_gradients(model, microbatches, "pair"), model, 1e-10)
    assert memory.refused == {}
    assert parameter_grams(model, microbatches, memory).fallback == {}


def reversed_inside(m: Any, x: Tensor) -> Tensor:
    return m.inner(x.flip(0)).flip(0)


def test_a_bad_row_and_a_wrong_sample_axis_are_both_met():
    """Rows left out, read sequence-first, then row by row: the finite rows are exact, the others unknown."""
    case, memory = (
        RuleCase(body=lambda m, x: m.inner(x.flip(0)).flip(0), parts=lambda: {"inner": nn.Linear(4, 3)}),
        GramMemory(),
    )
    model, ((x, y),) = case.model(stem=True), case.microbatches((4,))
    x[1] = torch.nan
    kept = torch.tensor([0, 2, 3])
    found = parameter_grams(model, [(x, y)], memory)
    assert set(found.fallback) == set(found.failed_certificates) == {"inner.weight", "inner.bias"}
    assert memory.positions_first == {"inner.weight", "inner.bias"}
    for K in found.grams.values():
        assert K[1].isnan().all()
        assert K[:, 1].isnan().all()
    rows = replace(found, grams={block: K[kept][:, kept] for block, K in found.grams.items()})
    assert_exact(rows, sample_gradients(model, [(x[kept], y[kept])], "pair"), model, 1e-10)


def test_coverage_is_the_same_after_a_gram_that_went_row_by_row():
    model, batch = CASES["mlp"].model(), CASES["mlp"].microbatches((4,))[0]
    refused = dict.fromkeys(dict(model.named_parameters()), "certificate failed before")
    memory = ProbeMemory(grams=GramMemory(refused=refused))
    with isolated(model, seed=0):
        problem = Problem(model, [batch], loss="cross_entropy", memory=memory)
        assert set(problem.grams().fallback) == set(refused)
        assert {name: list(used) for name, used in problem.grams.operations.items()} != {}
        assert set(problem.grams.operations) == set(refused)
    assert compute_kfac_coverage(model, batch, loss="cross_entropy").elements == 1.0


def test_the_budget_holds_inside_a_microbatch_with_many_passes():
    model, batch = CASES["mlp"].model(), CASES["mlp"].microbatches((4,))[0]
    fisher_type = FisherType(fisher="exact")
    small, large = (grams(model, batch, fisher_type, "cross_entropy", memory_budget=size) for size in (1, None))
    assert small.mode.endswith("block groups")
    assert large.mode == "factors on device"
    torch.testing.assert_close(small.grams["model"], large.grams["model"], rtol=1e-12, atol=0.0)
