"""Block Grams and Fisher spectra against one gradient per row in float64."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import compute_fisher_spectrum
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.model.blocks import group_blocks
from tests.cases import (
    CASES,
    MORE_FAMILIES,
    SIZES,
    Case,
    causal_batch,
    image_batch,
    in_general_position,
    masked_batch,
    seq2seq_batch,
)
from tests.families import family
from tests.gram.gram_cases import block_grams_of
from tests.reference import fisher_eigenvalues, gradients_of, relative_error, sample_gradients, stacked

SWEEP = {"causal": causal_batch, "tokens": masked_batch, "row": image_batch, "seq2seq": seq2seq_batch}
# Hugging Face norms, rotary embeddings and losses compute in float32 whatever the model's dtype.
TOLERANCE = 1e-5


def grams(case: Case, model: nn.Module, microbatches: list[Any], structure: str = "layer") -> BlockGrams:
    with offline_problem(model, microbatches, loss=case.loss, params_filter=None, block_structure=structure) as problem:
        return problem.grams()


@cache
def truth_of(name: str, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradients of single rows, by the oracle."""
    case = CASES[name]
    return sample_gradients(case.model(dtype), case.microbatches(sizes), case.kind)


def swept(name: str) -> Case:
    kind = MORE_FAMILIES[name]
    side = 16 if name == "swin" else 8
    batch = SWEEP[kind] if kind != "row" else lambda size, length, generator: image_batch(size, length, generator, side=side)
    return Case(name, "tokens" if kind == "seq2seq" else kind, lambda: family(name), batch)


def assert_grams(found: BlockGrams, truth: dict[str, Tensor], model: nn.Module, structure: str, tolerance: float):
    for block, names in group_blocks(model, list(truth), structure).items():
        G = stacked(truth, names)
        # Relative to the whole model: a block without gradient (key biases) is rounding in both.
        scale = max((G @ G.T).abs().max().item(), 1e-8 * stacked(truth).square().sum().item())
        assert (found.grams[block].cpu() - G @ G.T).abs().max().item() <= tolerance * scale, block


@pytest.mark.parametrize(
    ("name", "sizes", "structure"),
    [
        *((name, SIZES, "parameter") for name in CASES),
        *((name, *other) for name in ("gpt2", "resnet", "mlp") for other in (((4,), "layer"), (SIZES, "none"))),
    ],
    ids=str,
)
def test_grams_are_the_products_of_row_gradients(name: str, sizes: tuple[int, ...], structure: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches(sizes)
    found = grams(case, model, microbatches, structure)
    assert_grams(found, truth_of(name, sizes), model, structure, TOLERANCE)
    assert found.fallback == {}, "all has a rule"


@pytest.mark.slow  # parameter by parameter: tests/gram/capture/test_family_rules.py
@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_every_hugging_face_family(name: str):
    case = swept(name)
    model, microbatches = case.model(), case.microbatches((3, 1, 2))
    found = grams(case, model, microbatches)
    assert_grams(found, sample_gradients(model, microbatches, case.kind), model, "layer", TOLERANCE)


@pytest.mark.parametrize(
    ("name", "dtype", "centred"),
    [
        *((name, torch.float64, False) for name in CASES),
        *((name, torch.float32, True) for name in ("gpt2", "resnet", "mlp", "t5") if name in CASES),
    ],
    ids=str,
)
def test_spectra_agree_with_the_oracle(name: str, dtype: torch.dtype, centred: bool):
    case = CASES[name]
    model, microbatches = case.model(dtype), case.microbatches()
    spectra = compute_fisher_spectrum(model, microbatches, loss=case.loss, center_gradients=centred)
    truth = truth_of(name, dtype=dtype)
    everything = fisher_eigenvalues(stacked(truth), centred=centred)
    assert relative_error(spectra.full.eigenvalues, everything) < TOLERANCE
    for block, names in group_blocks(model, list(truth)).items():
        own = fisher_eigenvalues(stacked(truth, names), centred=centred)
        assert (spectra.blocks[block].eigenvalues.max() - own[0]).abs() < TOLERANCE * everything[0]
    assert spectra.full.num_params == stacked(truth).shape[1]
    if not centred:
        assert spectra.full.trace == pytest.approx(stacked(truth).square().sum(1).mean().item(), rel=TOLERANCE)
    assert_full_is_the_sum_of_blocks_and_block_diagonal_their_union(spectra)


def assert_full_is_the_sum_of_blocks_and_block_diagonal_their_union(spectra: Any) -> None:
    union = torch.cat([spectrum.eigenvalues for spectrum in spectra.blocks.values()]).sort(descending=True).values
    kept = spectra.block_diagonal.eigenvalues
    assert torch.equal(kept, union[: len(kept)])
    assert sum(spectrum.trace for spectrum in spectra.blocks.values()) == pytest.approx(spectra.full.trace)
    assert spectra.full.num_params == sum(spectrum.num_params for spectrum in spectra.blocks.values())


def test_blocks_do_have_cross_terms():
    """Else `full` against `block_diagonal` would test nothing."""
    spectra = compute_fisher_spectrum(CASES["gpt2"].model(), CASES["gpt2"].microbatches())
    assert spectra.full.eigenvalues[0] > 1.5 * spectra.block_diagonal.eigenvalues[0]


def test_a_tied_weight_holds_both_of_its_uses():
    """The gradient of GPT-2's embedding is the sum of its uses as embedding and as head; their cross terms count."""
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    truth = sample_gradients(model, microbatches, case.kind)["transformer.wte.weight"]
    untied = case.model()
    untied.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    parts = sample_gradients(untied, microbatches, case.kind)
    without = parts["transformer.wte.weight"] @ parts["transformer.wte.weight"].T
    without += parts["lm_head.weight"] @ parts["lm_head.weight"].T
    found = grams(case, model, microbatches, "parameter").grams["transformer.wte.weight"]
    assert relative_error(found, truth @ truth.T) < TOLERANCE
    assert relative_error(without, truth @ truth.T) > 0.05


class Routed(nn.Module):
    """A parameter indexed by what its sample holds, which has no rule, before a layer that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 5))
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(x * self.table[(x[:, 0] > 0).long()]))


def test_what_has_no_rule_is_listed_with_its_reason():
    case = CASES["mlp"]
    model = in_general_position(Routed).double()
    microbatches = case.microbatches()
    spectra = compute_fisher_spectrum(model, microbatches, loss=case.loss)
    assert spectra.metadata["fallback"] == {"table": "no rule for `getitem`"}
    truth = stacked(sample_gradients(model, microbatches, case.kind))
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(truth)) < 1e-10


@pytest.mark.parametrize("sizes", [(3,), (2, 3, 6)])
def test_a_sequence_first_layer_is_read_the_other_way(sizes: tuple[int, ...]):
    """T = 6 is a multiple of every N here: axis 0 passes for samples, and only the certificate can tell."""
    case, memory = CASES["sequence_first"], GramMemory()
    model, microbatches = case.model(), case.microbatches(sizes)
    with offline_problem(model, microbatches, loss=case.loss, params_filter=None) as problem:
        found = block_grams_of(problem, memory)
    assert memory.positions_first == {"inner.weight", "inner.bias"}
    assert found.fallback == {}
    assert_grams(found, sample_gradients(model, microbatches, case.kind), model, "layer", 1e-10)


def test_a_sample_that_is_not_finite_does_not_blind_the_certificate():
    case = CASES["sequence_first"]
    x, y = case.microbatches((3,))[0]
    x[0] = float("nan")
    model = case.model()
    with pytest.warns(UserWarning, match="1 of 3"):
        spectra = compute_fisher_spectrum(model, (x, y), loss=case.loss)
    truth = sample_gradients(model, [(x[1:], y[1:])], case.kind)
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(stacked(truth))) < 1e-10


def test_a_probe_that_proves_nothing_is_not_trusted_later():
    """The first probe of a run has a bad sample; the second must not take its word for the layout."""
    case, memory = CASES["sequence_first"], GramMemory()
    model, (bad, good) = case.model(), case.microbatches((3, 3, 1))[:2]
    bad[0][0] = float("nan")
    for batch in (bad, good):
        with offline_problem(model, [batch], loss=case.loss, params_filter=None) as problem:
            found = block_grams_of(problem, memory)
    assert_grams(found, sample_gradients(model, [good], case.kind), model, "layer", 1e-10)


def mean_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def losses_by_row(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("loss", [mean_cross_entropy, losses_by_row])
@pytest.mark.parametrize("name", ["mlp", "convnet", "encoder", "reused", "sequence_first"])
def test_a_mean_and_losses_by_row_mean_the_same(name: str, loss: Any):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    spectra = compute_fisher_spectrum(model, microbatches, loss=loss)
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(stacked(truth_of(name)))) < 1e-10


@pytest.mark.parametrize(("name", "target"), [("mse", 2.0), ("bce", 1.0)])
def test_named_losses_are_means_over_the_row(name: str, target: float):
    model = CASES["mlp"].model()
    x, _ = CASES["mlp"].microbatches((4,))[0]
    y = torch.rand(4, 3, dtype=torch.float64) * target
    spectra = compute_fisher_spectrum(model, (x, y), loss=name)
    function = {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}[name]
    truth = gradients_of(model, [lambda m, i=i: function(m(x[i]), y[i]) for i in range(4)])
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(stacked(truth))) < 1e-10


def test_dense_prediction_sums_over_its_valid_positions():
    """Cross-entropy of (N, C, H, W) logits: a sample's loss is the sum over pixels that are not ignored."""
    model = nn.Conv2d(1, 3, 3, padding=1).double()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    y = torch.randint(3, (3, 4, 4))
    y[0, :2] = -100
    spectra = compute_fisher_spectrum(model, (x, y), loss="cross_entropy")
    truth = gradients_of(
        model, [lambda m, i=i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1], reduction="sum") for i in range(3)]
    )
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(stacked(truth))) < 1e-10
    assert spectra.metadata["num_targets"] == 3 * 16 - 8
