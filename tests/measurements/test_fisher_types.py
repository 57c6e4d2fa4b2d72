"""Every type of Fisher and sample unit through the public function: dense oracles, draws, what the metadata says."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, FisherSpectra, FisherSpectrum, Problem, compute_fisher_spectrum
from curvature_callbacks.gram.probe_grams import ProbeGrams
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.record import scalar_tags
from tests.cases import CASES, VOCABULARY, in_general_position
from tests.measurements.fisher_type_cases import ALL, TYPES, sample_losses, spelled, valid_positions
from tests.reference import float64_copy, gradients_of, relative_error, rows, stacked


def token_gradients(model: nn.Module, microbatches: Sequence[Any]) -> list[dict[str, Tensor]]:
    """Of every row, name to (n_i, p) gradients of the losses of its single targets."""

    def loss(m: nn.Module, row: Any, t: int) -> Tensor:
        return -m(row["input_ids"], attention_mask=row["attention_mask"]).logits[0, t].log_softmax(0)[row["labels"][0, t + 1]]

    return [
        gradients_of(model, [lambda m, row=row, t=t: loss(m, row, t) for t in valid_positions(row)])
        for row in rows(microbatches)
    ]


def class_gradients(model: nn.Module, microbatches: Sequence[Any]) -> list[dict[str, Tensor]]:
    """Of every row, name to (n_i C, p): `sqrt(p_c)` times the gradient of the loss at class c, for every target."""
    replica = float64_copy(model)

    def probability(row: Any, t: int, c: int) -> float:
        with torch.no_grad():
            return replica(row["input_ids"], attention_mask=row["attention_mask"]).logits[0, t].softmax(0)[c].item()

    def loss(m: nn.Module, row: Any, t: int, c: int) -> Tensor:
        log_p = m(row["input_ids"], attention_mask=row["attention_mask"]).logits[0, t].log_softmax(0)[c]
        return -math.sqrt(probability(row, t, c)) * log_p

    return [
        gradients_of(
            model,
            [lambda m, row=row, t=t, c=c: loss(m, row, t, c) for t in valid_positions(row) for c in range(VOCABULARY)],
        )
        for row in rows(microbatches)
    ]


def eigenvalues_of(G: Tensor, normaliser: float, *, mean: Tensor | None = None) -> Tensor:
    """Of `G' G / normaliser - mean mean'`, dense in the parameters or, where that is smaller, in the gradients."""
    if mean is None:
        return torch.linalg.svdvals(G) ** 2 / normaliser
    return torch.linalg.eigvalsh(G.T @ G / normaliser - torch.outer(mean, mean)).flip(0)


def assert_oracle(found: FisherSpectra, blocks: Mapping[str, Sequence[str]], G: dict[str, Tensor], normaliser: float):
    assert relative_error(found.full.eigenvalues, eigenvalues_of(stacked(G), normaliser)) < 1e-9
    for block, names in blocks.items():
        assert relative_error(found.blocks[block].eigenvalues, eigenvalues_of(stacked(G, names), normaliser)) < 1e-9, block
    assert found.full.num_samples == len(stacked(G))


def concatenated(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(scope="module")
def gpt2() -> tuple[nn.Module, list[Any], Mapping[str, Sequence[str]]]:
    model, microbatches = CASES["gpt2"].model(), CASES["gpt2"].microbatches()[1:]
    return model, microbatches, Problem(model, microbatches).blocks


def test_tokens_by_their_own_gradients(gpt2: Any):
    model, microbatches, blocks = gpt2
    G = concatenated(token_gradients(model, microbatches))
    found = compute_fisher_spectrum(model, microbatches, sample_unit="token", num_targets=ALL)
    assert_oracle(found, blocks, G, len(stacked(G)))
    assert found.metadata["num_targets"] == found.metadata["num_gradients"] == len(stacked(G))


def test_exact_by_every_class(gpt2: Any):
    model, microbatches, blocks = gpt2
    parts = class_gradients(model, microbatches)
    G = concatenated(parts)
    for unit, normaliser in (("sequence", len(parts)), ("token", len(stacked(G)) // VOCABULARY)):
        found = compute_fisher_spectrum(model, microbatches, fisher="exact", sample_unit=unit)
        assert_oracle(found, blocks, G, normaliser)
    centred = compute_fisher_spectrum(model, microbatches, fisher="exact", sample_unit="token", center_gradients=True)
    assert torch.equal(centred.full.eigenvalues, found.full.eigenvalues)  # the mean over the predictive is zero


def test_centred_tokens(gpt2: Any):
    model, microbatches, _ = gpt2
    parts = token_gradients(model, microbatches)
    found = compute_fisher_spectrum(model, microbatches, sample_unit="token", num_targets=ALL, center_gradients=True)
    G = stacked(concatenated(parts))
    assert relative_error(found.full.eigenvalues, torch.linalg.svdvals(G - G.mean(0)) ** 2 / len(G)) < 1e-9


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_the_exact_fisher_of_targets_is_the_ggn_of_the_mean_loss(loss: str):
    model, (x, labels) = CASES["mlp"].model(), CASES["mlp"].microbatches((5,))[0]
    y = labels if loss == "cross_entropy" else torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    function = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}[loss]
    outputs = model(x)
    jacobian = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(z, model.parameters(), retain_graph=True)])
            for z in outputs.flatten()
        ]
    )
    hessian = torch.autograd.functional.hessian(lambda z: function(z, y), outputs.detach()).reshape(15, 15)
    ggn = torch.linalg.eigvalsh(jacobian.T @ hessian @ jacobian).flip(0)
    found = compute_fisher_spectrum(model, (x, y), loss=loss, fisher="exact", sample_unit="token")
    assert relative_error(found.full.eigenvalues, ggn) < 1e-10


@pytest.mark.parametrize(("fisher", "unit"), [("empirical", "token"), ("sampled", "sequence"), ("sampled", "token")])
def test_draws_are_unbiased(fisher: str, unit: str):
    """Traces over seeds, of a few targets and draws, against that of all, by its own standard error."""
    model, batch = spelled()
    every = {"fisher": "empirical" if fisher == "empirical" else "exact", "num_targets": ALL}
    expected = compute_fisher_spectrum(model, batch, sample_unit=unit, **every).full.trace
    traces = torch.tensor(
        [
            compute_fisher_spectrum(model, batch, fisher=fisher, sample_unit=unit, seed=seed, num_targets=2).full.trace
            for seed in range(40)
        ]
    )
    assert abs(traces.mean() - expected) < 4.5 * traces.std() / math.sqrt(len(traces))
    assert 0 < traces.std() < 0.5 * expected


def test_more_draws_come_closer():
    model, batch = spelled()
    exact = compute_fisher_spectrum(model, batch, fisher="exact").full
    few, many = (compute_fisher_spectrum(model, batch, fisher="sampled", num_draws=n).full for n in (2, 100))
    errors = [relative_error(found.eigenvalues[:3], exact.eigenvalues[:3]) for found in (few, many)]
    assert (few.num_samples, many.num_samples) == (6, 300)
    assert errors[1] < 0.2
    assert errors[1] < errors[0]


def test_a_part_of_the_parameters():
    model, batch = spelled()
    unrestricted = compute_fisher_spectrum(model, batch)
    parts = [compute_fisher_spectrum(model, batch, max_params_per_block=4, seed=seed) for seed in range(30)]
    assert {part.full.num_params for part in parts} == {unrestricted.full.num_params}
    traces = torch.tensor([part.full.trace for part in parts])
    assert traces.std() > 0
    assert abs(traces.mean() - unrestricted.full.trace) < 4.5 * traces.std() / math.sqrt(30)


def test_the_tokens_of_one_row_have_a_spectrum(gpt2: Any):
    model, microbatches, _ = gpt2
    found = compute_fisher_spectrum(model, microbatches, num_samples=1, sample_unit="token", num_targets=ALL)
    (part,) = token_gradients(model, [{name: values[:1] for name, values in microbatches[0].items()}])
    assert relative_error(found.full.eigenvalues, eigenvalues_of(stacked(part), len(stacked(part)))) < 1e-9
    assert "mean_gradient_norm_squared" not in found.full.metrics()  # no two independent rows


@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_metadata_and_names_tell_the_type(fisher: str, unit: str):
    model, microbatches = CASES["gpt2"].model(), CASES["gpt2"].microbatches()
    draws = 2 if fisher == "sampled" else 1
    measurement = FisherSpectrum(fisher=fisher, sample_unit=unit, num_draws=draws, num_targets=3, max_params_per_block=50)
    with isolated(model, seed=0):
        records, _ = measurement.measure(Problem(model, microbatches, seed=5, step=7), ())
    assert {record.measurement for record in records} == {measurement.name}
    assert measurement.name == f"{fisher}_fisher" + ("_token" if unit == "token" else "")
    assert f"curvature/{measurement.name}_full_trace" in scalar_tags(records)
    metadata = records[0].metadata
    valid = sum(len(valid_positions(row)) for row in rows(microbatches))
    expected = {
        "fisher": fisher,
        "sample_unit": unit,
        "num_samples_requested": 6,
        "num_samples": 6,
        "num_targets": valid,
        "centered": False,
        "deterministic": False,
        "max_params_per_block": 50,
        "dtype": "float64",
        "seed": 5,
        "step": 7,
    }
    assert {name: metadata[name] for name in expected} == expected
    assert metadata.get("num_draws") == (2 if fisher == "sampled" else None)
    assert metadata.get("num_targets_per_row") == (3 if unit == "token" and fisher != "exact" else None)
    assert records[0].scalars["full_num_samples"] == metadata["num_gradients"]
    assert isinstance(metadata["mode"], str)


def with_failed_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    grams = ProbeGrams.__call__

    def failing(self: ProbeGrams, *args: Any, **options: Any) -> Any:
        reasons = {"0.weight": "certificate failed (relative error 4.2e-01)", "0.bias": "no rule for `clone`"}
        return replace(grams(self, *args, **options), fallback=reasons, failed_certificates=("0.weight",))

    monkeypatch.setattr(ProbeGrams, "__call__", failing)


def test_a_failed_certificate_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    with_failed_certificate(monkeypatch)
    with pytest.warns(UserWarning, match="`0.weight` failed its certificate") as caught:
        compute_fisher_spectrum(model, microbatches, loss=case.loss)
    assert len(caught) == 1
    assert "0.bias" not in str(caught[0].message)
    measurement, state = FisherSpectrum(), None
    with caplog.at_level(logging.WARNING, logger="curvature_callbacks"):
        for step in range(2):
            with isolated(model, seed=0):
                problem = Problem(model, microbatches, loss=case.loss, step=step)
                records, state = measurement.measure(problem, measurement.init(problem) if state is None else state)
            assert "certificate failed" in records[0].metadata["fallback"]["0.weight"]
    assert [record.getMessage().count("`0.weight`") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "true"}, "`fisher` must be one of"),
        ({"sample_unit": "row"}, "`sample_unit` must be one of"),
        ({"num_draws": 2}, "draws no labels"),
        ({"num_targets": 0}, "`num_targets`"),
        ({"max_params_per_block": 0}, "`max_params_per_block`"),
        ({"max_sample_grad_norm": 0.0}, "`max_sample_grad_norm`"),
        ({"max_sample_grad_norm": math.nan}, "`max_sample_grad_norm`"),
        ({"fisher": "exact", "max_sample_grad_norm": 1.0}, "use 'sampled'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    case = CASES["mlp"]
    with pytest.raises(ConfigurationError, match=message):
        compute_fisher_spectrum(case.model(), case.microbatches(), loss=case.loss, **options)
    with pytest.raises(ConfigurationError, match=message):
        FisherSpectrum(**options)


@pytest.mark.parametrize("options", [{"fisher": "exact"}, {"sample_unit": "token"}, {"max_params_per_block": 3}])
def test_precomputed_gradients_have_no_type_to_choose(options: dict[str, Any]):
    given = [{"weight": torch.ones(1, 2)}] * 2
    with pytest.raises(ConfigurationError, match="`precomputed_gradients` are what they are"):
        compute_fisher_spectrum(nn.Linear(2, 1, bias=False), None, precomputed_gradients=given, **options)


@pytest.mark.parametrize(("fisher", "unit"), TYPES[1:])
def test_a_loss_without_known_targets_is_refused(fisher: str, unit: str):
    model = in_general_position(lambda: nn.Linear(5, 3)).double()
    with pytest.raises(ConfigurationError, match="cross_entropy, mse, bce"):
        compute_fisher_spectrum(model, CASES["mlp"].microbatches(), loss=sample_losses, fisher=fisher, sample_unit=unit)
