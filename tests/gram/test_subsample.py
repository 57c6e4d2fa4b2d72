"""`max_params_per_block`: a random part of a block stands for all of it, without bias, the same for every sample."""

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import compute_fisher_spectrum
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.gram.context import GramOptions
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.gram.storage import MemoryBudget
from curvature_callbacks.gram.subsample import chosen_slices
from curvature_callbacks.gram.uses.uses import OuterProduct
from curvature_callbacks.model.blocks import group_blocks
from curvature_callbacks.model.loss.fisher_type import FisherType
from tests.cases import CASES, Case
from tests.gram.gram_cases import block_grams_of, model_grams
from tests.reference import fisher_eigenvalues, sample_gradients, stacked

NAMES = ("gpt2", "convnet", "bert", "mixtral", "mlp")
LIMIT = 60


def grams(
    case: Case, model: nn.Module, microbatches: list[Any], limit: int | None, *, seed: int = 0, **options: Any
) -> BlockGrams:
    return model_grams(model, microbatches, loss=case.loss, seed=seed, max_params_per_block=limit, **options)


# Used expert by expert, which is counted in full.
IN_PARTS = ("experts.gate_up_proj", "experts.down_proj")


def expected_grams(
    model: nn.Module, truth: Mapping[str, Tensor], limit: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Block to the Gram of the chosen slices, parameter by parameter, and to the parameters counted."""
    values = dict(model.named_parameters())
    blocks = group_blocks(model, list(truth))
    slices = chosen_slices(values, blocks, limit, seed=seed)
    found, counted = {}, {}
    for block, names in blocks.items():
        total, number = torch.zeros(()), 0
        for name in names:
            G = truth[name].reshape(len(truth[name]), *(values[name].shape or (1,)))
            everything = torch.arange(G.shape[1])
            kept = everything if name.endswith(IN_PARTS) else slices.get(name, everything)
            scale = math.sqrt(G.shape[1] / len(kept))
            picked = torch.stack([G[:, index] * scale for index in kept.tolist()], 1).flatten(1)
            total = total + picked @ picked.T
            number += picked.shape[1]
        found[block], counted[block] = total, number
    return found, counted


@pytest.mark.parametrize("name", NAMES)
def test_the_gram_is_that_of_the_chosen_slices_scaled_up(name: str):
    """Of every microbatch and sample the same slices: else cross terms would be of different parameters."""
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    truth = sample_gradients(model, microbatches, case.kind)
    for seed in range(2):
        expected, _ = expected_grams(model, truth, LIMIT, seed)
        found = grams(case, model, microbatches, LIMIT, seed=seed)
        scale = max(K.abs().max().item() for K in expected.values())
        for block, K in expected.items():
            assert (found.grams[block] - K).abs().max().item() <= 1e-5 * scale, block
        assert found.fallback == {}
        assert found.certificate_error is not None
        assert found.certificate_error < 1e-5


@pytest.mark.parametrize("budget", [None, MemoryBudget(device_bytes=0, host_bytes=1 << 30), MemoryBudget(device_bytes=0)])
def test_modes_of_storage_count_the_same_slices(budget: MemoryBudget | None):
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    expected = grams(case, model, microbatches, LIMIT)
    found = grams(case, model, microbatches, LIMIT, budget=budget)
    for block, K in expected.grams.items():
        assert torch.allclose(found.grams[block], K, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_gram_and_trace_have_no_bias(name: str):
    """The mean over seeds against its own standard error; four of them are one chance in 16 000."""
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    truth = sample_gradients(model, microbatches, case.kind)
    blocks = group_blocks(model, list(truth))
    draws: dict[str, list[Tensor]] = {block: [] for block in blocks}
    for seed in range(60 if name == "mlp" else 20):
        found = grams(case, model, microbatches, 8 if name == "mlp" else LIMIT, seed=seed).grams
        for block in blocks:
            draws[block].append(found[block])
    varied = 0
    for block, names in blocks.items():
        G, drawn = stacked(truth, names), torch.stack(draws[block])
        error = drawn.std(0) / math.sqrt(len(drawn))
        assert ((drawn.mean(0) - G @ G.T).abs() <= 4 * error + 1e-5 * (G @ G.T).abs().max()).all(), block
        traces = torch.tensor([float(K.trace()) for K in drawn], dtype=torch.float64)
        standard_error = traces.std().item() / math.sqrt(len(traces))
        assert abs(traces.mean().item() - G.square().sum().item()) <= 4 * standard_error + 1e-5 * G.square().sum().item()
        varied += standard_error > 1e-3 * traces.mean().item()
    assert varied >= 2


def test_no_more_directions_than_parameters_counted():
    """With as few as one slice of a matrix; a subsample of its own for each sample would have full rank."""
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    truth = sample_gradients(model, microbatches, case.kind)
    _, counted = expected_grams(model, truth, 3, 0)
    found = grams(case, model, microbatches, 3)
    ranks = {block: int(torch.linalg.matrix_rank(K, rtol=1e-10)) for block, K in found.grams.items()}
    assert all(ranks[block] <= counted[block] for block in ranks)
    assert min(counted.values()) < 6


def test_small_blocks_are_counted_as_they_are():
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    values = dict(model.named_parameters())
    sizes = {block: sum(values[name].numel() for name in names) for block, names in group_blocks(model, list(values)).items()}
    limit = sorted(sizes.values())[1]
    exact, found = grams(case, model, microbatches, None), grams(case, model, microbatches, limit)
    for block, size in sizes.items():
        assert torch.equal(found.grams[block], exact.grams[block]) == (size <= limit), block
    assert len(set(sizes.values())) == 3


def test_every_parameter_keeps_its_share_and_at_least_one_slice():
    values = {"scalar": torch.zeros(()), "vector": torch.zeros(7), "matrix": torch.zeros(40, 5), "table": torch.zeros(1000, 3)}
    slices = chosen_slices(values, {"block": list(values)}, 320, seed=0)  # a tenth of 3208
    assert {name: len(chosen) for name, chosen in slices.items()} == {"vector": 1, "matrix": 4, "table": 100}
    for name, chosen in slices.items():
        assert torch.equal(chosen, chosen.unique())  # sorted, each once
        assert chosen.min() >= 0
        assert chosen.max() < len(values[name])
    tiny = chosen_slices(values, {"block": list(values)}, 1, seed=0)
    assert all(len(chosen) == 1 for chosen in tiny.values())
    assert chosen_slices(values, {"block": list(values)}, 3208, seed=0) == {}
    assert chosen_slices(values, {"block": list(values)}, None, seed=0) == {}


def test_slices_follow_seed_and_name():
    values = {"first": torch.zeros(1000), "second": torch.zeros(1000)}
    slices = chosen_slices(values, {"block": ["first", "second"]}, 200, seed=0)
    others = chosen_slices(values, {"block": ["second", "first"]}, 200, seed=0)
    assert not torch.equal(slices["first"], slices["second"])
    assert torch.equal(slices["first"], others["first"])
    assert not torch.equal(slices["first"], chosen_slices(values, {"block": ["first", "second"]}, 200, seed=1)["first"])


def test_slices_are_the_same_in_every_process():
    """Python's own hash of a string differs from process to process."""
    program = (
        "import torch\n"
        "from curvature_callbacks.gram.subsample import chosen_slices\n"
        "print(chosen_slices({'w': torch.zeros(1000)}, {'b': ['w']}, 12, seed=3)['w'].tolist())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # and not that of this process, which is drawn
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == str(chosen_slices({"w": torch.zeros(1000)}, {"b": ["w"]}, 12, seed=3)["w"].tolist())


def test_the_certificate_still_catches_a_wrong_rule(monkeypatch: pytest.MonkeyPatch):
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    original = OuterProduct.factors

    def wrong(self: OuterProduct) -> tuple[Tensor, Tensor]:
        left, right = original(self)
        return (left.flip(0), right) if right.shape[-1] == 6 else (left, right)  # gradients of other samples

    monkeypatch.setattr(OuterProduct, "factors", wrong)
    found = grams(case, model, microbatches, 12)
    assert set(found.fallback) == {"2.weight"}
    assert found.fallback["2.weight"].startswith("certificate failed")


def test_what_goes_row_by_row_is_counted_in_full():
    """No bias either way."""
    case, memory = CASES["mlp"], GramMemory(refused={"0.weight": "for the test"})
    model, microbatches = case.model(), case.microbatches()
    with offline_problem(model, microbatches, loss=case.loss, params_filter=None, block_structure="parameter") as problem:
        found = block_grams_of(problem, memory, options=GramOptions(max_params_per_block=10))
    G = sample_gradients(model, microbatches, case.kind)["0.weight"]
    assert torch.allclose(found.grams["0.weight"], G @ G.T)


@pytest.mark.parametrize(
    "fisher_type", [FisherType(fisher="sampled"), FisherType(fisher="exact"), FisherType(sample_unit="token")]
)
def test_other_types_of_fisher_count_the_same_slices(fisher_type: FisherType):
    case = CASES["bert_classifier"]
    model, microbatches = case.model(), case.microbatches()
    exact, found = (grams(case, model, microbatches, limit, fisher_type=fisher_type) for limit in (None, LIMIT))
    assert found.fallback == {}
    assert torch.equal(found.samples, exact.samples)
    for block, K in found.grams.items():
        assert 0.05 < K.trace() / exact.grams[block].trace() < 20, block


def test_spectra_say_what_was_counted():
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    exact = compute_fisher_spectrum(model, microbatches, loss=case.loss)
    found = compute_fisher_spectrum(model, microbatches, loss=case.loss, max_params_per_block=12)
    expected, _ = expected_grams(model, sample_gradients(model, microbatches, case.kind), 12, 0)
    assert found.metadata["max_params_per_block"] == 12
    assert found.full.num_params == exact.full.num_params
    assert found.full.trace == pytest.approx(sum(float(K.trace()) for K in expected.values()) / 6)
    whole = torch.stack(list(expected.values())).sum(0) / 6
    eigenvalues = torch.linalg.eigvalsh(whole).flip(0)
    assert torch.allclose(found.full.eigenvalues, eigenvalues[: len(found.full.eigenvalues)])
    truth = stacked(sample_gradients(model, microbatches, case.kind))
    assert not torch.allclose(found.full.eigenvalues, fisher_eigenvalues(truth)[: len(found.full.eigenvalues)], rtol=1e-3)
