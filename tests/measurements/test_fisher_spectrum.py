"""The empirical Fisher's spectrum of rows: truth, what changes nothing, what is left out or refused, metadata."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import (
    ConfigurationError,
    FisherSpectra,
    FisherSpectrum,
    Problem,
    RefusedError,
    compute_fisher_spectrum,
)
from curvature_callbacks.problem.memory import ProbeMemory
from tests.cases import CASES, in_general_position
from tests.reference import fisher_eigenvalues, relative_error, rows, sample_gradients, spectrum_metrics, stacked

RATIOS = ("rank", "condition_number", "effective_rank", "stable_rank", "participation_ratio", "top_share")


def assert_same(found: FisherSpectra, expected: FisherSpectra, tolerance: float):
    assert relative_error(found.full.eigenvalues, expected.full.eigenvalues) <= tolerance
    assert list(found.blocks) == list(expected.blocks)
    for block, spectrum in expected.blocks.items():
        assert relative_error(found.blocks[block].eigenvalues, spectrum.eigenvalues) <= tolerance, block


def padded(batch: Mapping[str, Tensor], extra: int) -> dict[str, Tensor]:
    """`extra` more padded positions on the right."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: F.pad(values, (0, extra), value=fill[name]) for name, values in batch.items()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_padding_changes_nothing(name: str):
    model, microbatches = CASES[name].model(), CASES[name].microbatches()
    expected = compute_fisher_spectrum(model, microbatches)
    found = compute_fisher_spectrum(model, [padded(batch, extra) for extra, batch in enumerate(microbatches, start=1)])
    assert_same(found, expected, 1e-6)
    assert found.metadata["num_targets"] == expected.metadata["num_targets"]


@pytest.mark.parametrize("sizes", [(6,), (1, 1, 1, 1, 1, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "bert_classifier"])
def test_microbatch_size_changes_nothing(name: str, sizes: tuple[int, ...]):
    model, batch = CASES[name].model(), CASES[name].microbatches((6,))[0]
    pieces = [dict(zip(batch, part, strict=True)) for part in zip(*(v.split(sizes) for v in batch.values()), strict=True)]
    expected = stacked(sample_gradients(model, [batch], CASES[name].kind))
    found = compute_fisher_spectrum(model, pieces)
    assert relative_error(found.full.eigenvalues, fisher_eigenvalues(expected)) < 1e-6
    assert found.full.num_samples == 6


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_row_order_changes_nothing(name: str):
    model, batch = CASES[name].model(), CASES[name].microbatches((6,))[0]
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = {name: values[order] for name, values in batch.items()}
    assert_same(compute_fisher_spectrum(model, shuffled), compute_fisher_spectrum(model, batch), 1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scaling_the_loss_changes_no_rank_and_no_ratio(dtype: torch.dtype, scale: float):
    case = CASES["mlp"]
    model, microbatches = case.model(dtype), case.microbatches()

    def scaled(factor: float) -> FisherSpectra:
        def loss(m: nn.Module, batch: Any) -> Tensor:
            return factor * F.cross_entropy(m(batch[0]), batch[1], reduction="none")

        return compute_fisher_spectrum(model, microbatches, loss=loss)

    here, there = scaled(1.0), scaled(scale)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3  # condition numbers here are 1e2 to 1e3
    for block in here.blocks:
        metrics, others = here.blocks[block].metrics(), there.blocks[block].metrics()
        assert {name: others[name] for name in RATIOS} == pytest.approx({name: metrics[name] for name in RATIOS}, rel=tolerance)
        assert others["lambda_max"] == pytest.approx(scale**2 * metrics["lambda_max"], rel=tolerance)


@pytest.mark.parametrize("name", ["gpt2", "mlp", "convnet"])
def test_metrics_are_those_of_the_definitions(name: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    spectra = compute_fisher_spectrum(model, microbatches, loss=case.loss)
    G = stacked(sample_gradients(model, microbatches, case.kind))
    expected = spectrum_metrics(fisher_eigenvalues(G), G.shape[1], G, damping=0.01)
    assert spectra.full.metrics(damping=0.01) == pytest.approx(expected, rel=1e-5)


def test_num_samples_takes_the_first_rows_across_microbatches():
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches((2, 2, 2))
    truth = stacked(sample_gradients(model, microbatches, case.kind))
    for count in (2, 3, 5, 6, 60):
        spectra = compute_fisher_spectrum(model, microbatches, num_samples=count)
        assert spectra.full.num_samples == min(count, 6)
        assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(truth[:count])) < 1e-6


@pytest.mark.parametrize("centred", [False, True])
def test_two_samples(centred: bool):
    model, (batch,) = CASES["mlp"].model(), CASES["mlp"].microbatches((2,))
    spectra = compute_fisher_spectrum(model, batch, loss="cross_entropy", center_gradients=centred)
    G = stacked(sample_gradients(model, [batch], "pair"))
    assert spectra.full.rank == (1 if centred else 2)
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(G, centred=centred)) < 1e-10


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("N", [2, 5, 30])
def test_more_samples_than_parameters(N: int, bias: bool):
    model = nn.Linear(1, 1, bias=bias).double()
    x, y = torch.randn(2, N, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spectra = compute_fisher_spectrum(model, (x, y), loss="mse")
    errors = (model(x) - y).detach()
    G = torch.cat([2 * errors * x, 2 * errors], dim=1)[:, : 1 + bias]
    assert spectra.full.rank == 1 + bias
    assert torch.allclose(spectra.full.eigenvalues, torch.linalg.eigvalsh(G.T @ G / N).flip(0))
    assert spectra.full.metrics()["condition_number_damped"] == pytest.approx(
        ((spectra.full.eigenvalues[0] + 1e-3) / (spectra.full.eigenvalues[-1] + 1e-3)).item()
    )


def test_bfloat16_models_are_measured_in_float32():
    case = CASES["gpt2"]
    model, microbatches = case.model(torch.bfloat16), case.microbatches()
    spectra = compute_fisher_spectrum(model, microbatches)
    truth = stacked(sample_gradients(model, microbatches, case.kind))  # its float64 copy has the same bf16 values
    assert spectra.metadata["dtype"] == "float32"
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(truth)) < 1e-5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mlp", "convnet", "encoder"])
def test_a_sample_that_is_not_finite_is_left_out_and_counted(name: str, bad: float):
    case = CASES[name]
    model, (x, y) = case.model(), case.microbatches((5,))[0]
    x[3].flatten()[0] = bad
    keep = torch.tensor([0, 1, 2, 4])
    with pytest.warns(UserWarning, match="1 of 5 samples were left out"):
        spectra = compute_fisher_spectrum(model, (x, y), loss=case.loss)
    truth = stacked(sample_gradients(model, [(x[keep], y[keep])], case.kind))
    assert (spectra.metadata["num_samples_requested"], spectra.metadata["num_samples"]) == (5, 4)
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(truth)) < 1e-10


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_a_sample_without_valid_target_is_left_out(name: str, row: int):
    case = CASES[name]
    model, (batch,) = case.model(), case.microbatches((4,))
    batch["labels"][row] = -100
    with pytest.warns(UserWarning, match="1 of 4 samples were left out"):
        spectra = compute_fisher_spectrum(model, batch)
    kept = [i for i in range(4) if i != row]
    truth = stacked(sample_gradients(model, [batch], case.kind))[kept]
    assert spectra.full.num_samples == 3
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(truth)) < 1e-6


@pytest.mark.parametrize("empty", [0, 2])
def test_a_microbatch_without_valid_target_changes_nothing(empty: int):
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    microbatches[empty]["labels"][:] = -100
    with pytest.warns(UserWarning, match="left out"):
        spectra = compute_fisher_spectrum(model, microbatches)
    rest = [batch for i, batch in enumerate(microbatches) if i != empty]
    truth = stacked(sample_gradients(model, rest, case.kind))
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(truth)) < 1e-6


def test_all_labels_ignored_is_a_configuration_error():
    case = CASES["gpt2"]
    microbatches = case.microbatches()
    for batch in microbatches:
        batch["labels"][:] = -100
    with pytest.raises(ConfigurationError, match="ignored"):
        compute_fisher_spectrum(case.model(), microbatches)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_that_couples_the_samples_is_refused(reduction: str):
    """In-batch contrastive: every row is every other row's negative."""
    case = CASES["mlp"]

    def contrastive(model: nn.Module, batch: Any) -> Tensor:
        embedded = F.normalize(model(batch[0]), dim=1)
        return F.cross_entropy(embedded @ embedded.T / 0.1, torch.arange(len(embedded)).roll(1), reduction=reduction)

    with pytest.raises(RefusedError, match=r"coupled|do not have gradients of their own"):
        compute_fisher_spectrum(case.model(), case.microbatches((6,)), loss=contrastive)


def test_a_batch_mean_over_ragged_targets_is_refused():
    """A scalar mean over tokens does not separate into means over rows."""
    case = CASES["gpt2"]

    def token_mean(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss

    with pytest.raises(RefusedError, match="coupled"):
        compute_fisher_spectrum(case.model(), case.microbatches((4,)), loss=token_mean)


def test_batch_norm_in_train_mode_is_measured_with_its_running_statistics():
    case = CASES["convnet"]
    model, microbatches = case.model(), case.microbatches()
    truth = stacked(sample_gradients(model, microbatches, case.kind))
    model.train()
    model.bn1.eval()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    spectra = compute_fisher_spectrum(model, microbatches, loss=case.loss)
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(truth)) < 1e-10
    assert spectra.metadata["batch_norm"] == "eval"
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "convnet", "encoder"])
def test_params_filter_measures_only_what_it_keeps(name: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    truth = sample_gradients(model, microbatches, case.kind)
    kept = [name for name in truth if "1" in name]
    spectra = compute_fisher_spectrum(model, microbatches, loss=case.loss, params_filter=lambda name, _: "1" in name)
    assert spectra.full.num_params == stacked(truth, kept).shape[1]
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(stacked(truth, kept))) < 1e-6


def test_frozen_parameters_are_not_measured():
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    truth = sample_gradients(model, microbatches, case.kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("h.1" in name)
    spectra = compute_fisher_spectrum(model, microbatches)
    G = stacked(truth, [name for name in truth if "h.1" in name])
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(G)) < 1e-6
    assert [parameter.requires_grad for parameter in model.parameters()] == ["h.1" in n for n, _ in model.named_parameters()]


def test_metadata_states_the_conventions():
    case = CASES["gpt2"]
    microbatches = case.microbatches()
    metadata = compute_fisher_spectrum(case.model(), microbatches, seed=7, center_gradients=True).metadata
    assert (metadata["fisher"], metadata["sample_unit"], metadata["centered"]) == ("empirical", "sequence", True)
    assert (metadata["num_samples_requested"], metadata["num_samples"], metadata["seed"]) == (6, 6, 7)
    assert metadata["num_targets"] == sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows(microbatches))
    assert metadata["certificate_error"] < 1e-10
    assert metadata["dtype"] == "float64"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_structure": "layers"}, "block_structure"),
        ({"eigensolve_device": "tpu"}, "eigensolve_device"),
        ({"num_samples": 0}, "num_samples"),
        ({"loss": "hinge"}, "loss"),
        ({"params_filter": lambda name, parameter: False}, "params_filter"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    case = CASES["mlp"]
    with pytest.raises(ConfigurationError, match=message):
        compute_fisher_spectrum(case.model(), case.microbatches(), **{"loss": case.loss, **options})


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"eigensolve_device": "gpu"}])
def test_the_measurement_checks_its_options(options: dict[str, Any]):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        FisherSpectrum(**options)


def test_the_same_bits_twice_and_no_trace_left():
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = (compute_fisher_spectrum(model, microbatches) for _ in range(2))
    assert torch.equal(first.full.eigenvalues, second.full.eigenvalues)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random_state, torch.get_rng_state())


def test_dropout_is_off_and_the_mode_comes_back():
    model = in_general_position(lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3))).double().train()
    batch = CASES["mlp"].microbatches((4,))[0]
    spectra = compute_fisher_spectrum(model, batch, loss="cross_entropy")
    truth = stacked(sample_gradients(model, [batch], "pair"))
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(truth)) < 1e-12
    assert all(module.training for module in model.modules())


def test_a_mean_over_ragged_rows_is_refused_also_after_an_even_batch():
    """The mean over all tokens of a batch is no mean over rows once lengths differ."""

    def mean_over_tokens(model: Any, batch: Any) -> Any:
        losses = torch.nn.functional.mse_loss(model(batch[0]), batch[0], reduction="none").mean(-1)
        return (losses * batch[1]).sum() / batch[1].sum()

    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 3), torch.randn(4, 5, 3)
    even, ragged = torch.ones(4, 5), torch.tensor([[1.0] * n + [0.0] * (5 - n) for n in (5, 1, 2, 4)])
    memory = ProbeMemory()
    for mask in (even, ragged):
        problem = Problem(model, [(x, mask)], loss=mean_over_tokens, memory=memory)
        if mask is even:
            assert problem.grams().certificate_error < 1e-4
        else:
            with pytest.raises(RefusedError, match="coupled"):
                _ = problem.grams()
