"""Every type of Fisher and sample unit through the public function: dense oracles, invariances, what the metadata says."""

import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, FisherSpectra, FisherSpectrum, Problem, compute_fisher_spectrum
from curvature_callbacks.gram.probe_grams import ProbeGrams
from curvature_callbacks.isolation.model import deterministic_algorithms, isolated
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.record import scalar_tags
from tests.cases import CASES, VOCABULARY, in_general_position
from tests.reference import float64_copy, gradients_of, relative_error, rows, stacked

TYPES = [(fisher, unit) for fisher in ("empirical", "sampled", "exact") for unit in ("sequence", "token")]
WITHOUT_DRAWS = [(fisher, unit) for fisher, unit in TYPES if fisher != "sampled"]
RATIOS = ("rank", "condition_number", "effective_rank", "stable_rank", "participation_ratio", "top_share")
ALL = 1000  # targets a row: every one of them


def valid_positions(row: Mapping[str, Tensor]) -> list[int]:
    return [t for t in range(row["labels"].shape[1] - 1) if row["labels"][0, t + 1] != -100]


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


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(scope="module")
def gpt2() -> tuple[nn.Module, list[Any], Mapping[str, Sequence[str]]]:
    model, microbatches = CASES["gpt2"].model(), CASES["gpt2"].microbatches()[1:]
    return model, microbatches, Problem(model, microbatches).blocks


def test_tokens_by_their_own_gradients(gpt2: Any):
    model, microbatches, blocks = gpt2
    G = joined(token_gradients(model, microbatches))
    found = compute_fisher_spectrum(model, microbatches, sample_unit="token", num_targets=ALL)
    assert_oracle(found, blocks, G, len(stacked(G)))
    assert found.metadata["num_targets"] == found.metadata["num_gradients"] == len(stacked(G))


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_exact_by_every_class(gpt2: Any, unit: str):
    model, microbatches, blocks = gpt2
    parts = class_gradients(model, microbatches)
    G = joined(parts)
    normaliser = len(parts) if unit == "sequence" else len(stacked(G)) // VOCABULARY
    found = compute_fisher_spectrum(model, microbatches, fisher="exact", sample_unit=unit)
    assert_oracle(found, blocks, G, normaliser)
    centred = compute_fisher_spectrum(model, microbatches, fisher="exact", sample_unit=unit, center_gradients=True)
    assert torch.equal(centred.full.eigenvalues, found.full.eigenvalues)  # the mean over the predictive is zero


def test_centred_tokens(gpt2: Any):
    model, microbatches, _ = gpt2
    parts = token_gradients(model, microbatches)
    found = compute_fisher_spectrum(model, microbatches, sample_unit="token", num_targets=ALL, center_gradients=True)
    G = stacked(joined(parts))
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


class Speller(nn.Module):
    """A language model of two parameters, cheap enough for many seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.table(input_ids).cumsum(1)))
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits=logits)


def spelled(size: int = 3) -> tuple[nn.Module, dict[str, Tensor]]:
    batch = CASES["gpt2"].microbatches((size,))[0]
    return in_general_position(Speller).double(), {
        **batch,
        "labels": torch.where(batch["labels"] == -100, -100, batch["labels"] % 4),
    }


@pytest.mark.parametrize(("fisher", "unit"), [("empirical", "token"), ("sampled", "sequence"), ("sampled", "token")])
def test_draws_are_unbiased(fisher: str, unit: str):
    """Traces over seeds, of a few targets and draws, against that of all, by its own standard error."""
    model, batch = spelled()
    whole = {"fisher": "empirical" if fisher == "empirical" else "exact", "num_targets": ALL}
    expected = compute_fisher_spectrum(model, batch, sample_unit=unit, **whole).full.trace
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


def padded(batch: Mapping[str, Tensor], extra: int) -> dict[str, Tensor]:
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: F.pad(values, (0, extra), value=fill[name]) for name, values in batch.items()}


def assert_same(found: FisherSpectra, expected: FisherSpectra):
    assert relative_error(found.full.eigenvalues, expected.full.eigenvalues) < 1e-6
    assert found.full.rank == expected.full.rank
    metrics = expected.full.metrics()
    assert found.full.metrics() == pytest.approx(metrics, rel=1e-4, abs=1e-9 * metrics["trace"])
    for block, spectrum in expected.blocks.items():
        assert relative_error(found.blocks[block].eigenvalues, spectrum.eigenvalues) < 1e-6, block


@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_padding_changes_nothing(fisher: str, unit: str):
    """Nor the labels and targets drawn."""
    model, batch = spelled(4)
    microbatches = [{name: values[part] for name, values in batch.items()} for part in (slice(3), slice(3, 4))]
    options = {"fisher": fisher, "sample_unit": unit, "num_targets": 2, "seed": 3}
    wide = [padded(batch, extra) for extra, batch in enumerate(microbatches, start=1)]
    assert_same(compute_fisher_spectrum(model, wide, **options), compute_fisher_spectrum(model, microbatches, **options))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1)])
@pytest.mark.parametrize(("fisher", "unit"), WITHOUT_DRAWS)
def test_microbatch_size_changes_nothing(fisher: str, unit: str, sizes: tuple[int, ...]):
    model, batch = spelled(4)
    pieces = [dict(zip(batch, part, strict=True)) for part in zip(*(v.split(sizes) for v in batch.values()), strict=True)]
    options = {"fisher": fisher, "sample_unit": unit, "num_targets": ALL}
    assert_same(compute_fisher_spectrum(model, pieces, **options), compute_fisher_spectrum(model, batch, **options))


@pytest.mark.parametrize(("fisher", "unit"), WITHOUT_DRAWS)
def test_row_order_changes_nothing(fisher: str, unit: str):
    model, batch = spelled(4)
    shuffled = {name: values[torch.tensor([2, 0, 3, 1])] for name, values in batch.items()}
    options = {"fisher": fisher, "sample_unit": unit, "num_targets": ALL}
    assert_same(compute_fisher_spectrum(model, shuffled, **options), compute_fisher_spectrum(model, batch, **options))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_the_unit_of_the_outputs_changes_no_rank_and_no_ratio(fisher: str, unit: str, scale: float):
    """Outputs and targets times 1e-3 and 1e3: the squared error, and where it counts its gradient, by 1e-6 and 1e6."""
    x, y = CASES["mlp"].microbatches((5,))[0][0], torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()

    def spectra(factor: float) -> FisherSpectra:
        model = nn.Sequential(CASES["mlp"].model(), Times(factor))
        return compute_fisher_spectrum(model, (x, factor * y), loss="mse", fisher=fisher, sample_unit=unit)

    here, there = spectra(1.0), spectra(scale)
    eigenvalue_scale = scale**4 if fisher == "empirical" else scale**2  # of a gradient or of a Jacobian, squared
    for block in here.blocks:
        metrics, others = here.blocks[block].metrics(), there.blocks[block].metrics()
        assert {name: others[name] for name in RATIOS} == pytest.approx({name: metrics[name] for name in RATIOS}, rel=1e-6)
        assert others["lambda_max"] == pytest.approx(eigenvalue_scale * metrics["lambda_max"], rel=1e-9)


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_a_row_without_valid_target_is_left_out(fisher: str, unit: str, row: int):
    model, batch = spelled()
    rest = {name: values[torch.arange(3) != row] for name, values in batch.items()}
    batch["labels"][row] = -100
    options = {"fisher": fisher, "sample_unit": unit, "num_targets": ALL, "seed": 1}
    with pytest.warns(UserWarning, match="1 of 3 samples were left out"):
        found = compute_fisher_spectrum(model, batch, **options)
    assert found.metadata["num_targets"] == sum(len(valid_positions(r)) for r in rows([rest]))
    assert_same(found, compute_fisher_spectrum(model, rest, **options))  # the row uses no draw either


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_a_row_that_is_not_finite_is_left_out_with_all_its_gradients(fisher: str, unit: str, bad: float):
    model, (x, y) = CASES["mlp"].model(), CASES["mlp"].microbatches((5,))[0]
    keep = torch.tensor([0, 1, 2, 4])
    options = {"loss": "cross_entropy", "fisher": fisher, "sample_unit": unit}
    expected = compute_fisher_spectrum(model, (x[keep], y[keep]), **options)
    x[3, 1] = bad
    with pytest.warns(UserWarning, match="1 of 5 samples were left out"):
        found = compute_fisher_spectrum(model, (x, y), **options)
    assert (found.metadata["num_samples_requested"], found.metadata["num_samples"], found.metadata["num_targets"]) == (5, 4, 4)
    assert found.full.num_samples == expected.full.num_samples
    if fisher == "sampled":  # other draws
        assert found.full.eigenvalues.isfinite().all()
    else:
        assert_same(found, expected)


@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_a_row_that_is_not_finite_at_a_later_probe(fisher: str, unit: str):
    """Then the layout is certified and its Gram is taken as it comes."""
    model, (x, y) = CASES["mlp"].model(), CASES["mlp"].microbatches((5,))[0]
    keep, bad, memory = torch.tensor([0, 1, 2, 4]), x.clone(), ProbeMemory()
    bad[3, 1] = math.nan
    measurement, found = FisherSpectrum(fisher=fisher, sample_unit=unit), []
    for inputs, labels in ((x, y), (x[keep], y[keep]), (bad, y)):
        with isolated(model, seed=0):
            problem = Problem(model, [(inputs, labels)], loss="cross_entropy", memory=memory)
            found.append(measurement.measure(problem, ())[0][0])
    _, expected, last = found
    assert (last.metadata["num_samples_requested"], last.metadata["num_samples"], last.metadata["num_targets"]) == (5, 4, 4)
    assert last.metadata["certificate_error"] is None
    assert last.scalars["full_num_samples"] == expected.scalars["full_num_samples"]
    if fisher == "sampled":
        assert all(math.isfinite(value) for value in last.scalars.values())
    else:
        values = [torch.tensor(record.arrays["full_eigenvalues"]) for record in (last, expected)]
        assert relative_error(*values) < 1e-6


def test_a_part_of_the_parameters():
    model, batch = spelled()
    whole = compute_fisher_spectrum(model, batch)
    parts = [compute_fisher_spectrum(model, batch, max_params_per_block=4, seed=seed) for seed in range(30)]
    assert {part.full.num_params for part in parts} == {whole.full.num_params}
    traces = torch.tensor([part.full.trace for part in parts])
    assert traces.std() > 0
    assert abs(traces.mean() - whole.full.trace) < 4.5 * traces.std() / math.sqrt(30)


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
        return replace(grams(self, *args, **options), fallback=reasons)

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


def test_clipped_gradients():
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    G = stacked(gradients_of(model, [lambda m, row=row: F.cross_entropy(m(row[0]), row[1]) for row in rows(microbatches)]))
    norms = G.norm(dim=1)
    limit = float(norms.sort().values[2:4].mean())
    shorter = G * (limit / norms).clamp(max=1.0)[:, None]
    found = compute_fisher_spectrum(model, microbatches, loss=case.loss, max_sample_grad_norm=limit)
    assert relative_error(found.full.eigenvalues, torch.linalg.svdvals(shorter) ** 2 / 6) < 1e-9
    first = sum(p.numel() for name, p in model.named_parameters() if name.startswith("0."))
    assert relative_error(found.blocks["0"].eigenvalues, torch.linalg.svdvals(shorter[:, :first]) ** 2 / 6) < 1e-9
    assert (found.metadata["num_clipped"], found.metadata["max_sample_grad_norm"]) == (3, limit)
    centred = compute_fisher_spectrum(model, microbatches, loss=case.loss, max_sample_grad_norm=limit, center_gradients=True)
    assert relative_error(centred.full.eigenvalues, torch.linalg.svdvals(shorter - shorter.mean(0)) ** 2 / 6) < 1e-9


@pytest.mark.parametrize(("fisher", "unit"), TYPES[:4])
def test_gradients_of_one_length(gpt2: Any, fisher: str, unit: str):
    """A limit below all of them: whatever the weights, the mean squared norm is its square."""
    model, microbatches, _ = gpt2
    found = compute_fisher_spectrum(
        model, microbatches, fisher=fisher, sample_unit=unit, num_targets=2, max_sample_grad_norm=1e-3
    )
    assert found.full.trace == pytest.approx(1e-6, rel=1e-9)
    assert found.metadata["num_clipped"] == found.full.num_samples


def test_the_record_counts_clipped_gradients():
    case = CASES["mlp"]
    model = case.model()
    with isolated(model, seed=0):
        problem = Problem(model, case.microbatches(), loss=case.loss)
        some, none = (FisherSpectrum(max_sample_grad_norm=limit).measure(problem, ())[0][0] for limit in (1e-3, 1e6))
        off = FisherSpectrum().measure(problem, ())[0][0]
    assert (some.scalars["num_clipped"], none.scalars["num_clipped"]) == (6.0, 0.0)
    assert "num_clipped" not in off.scalars
    assert none.scalars["full_trace"] == off.scalars["full_trace"]


def test_clipping_of_precomputed_gradients():
    model = nn.Linear(2, 1, bias=False)
    given = [{"weight": torch.tensor([[3.0, 4.0]])}, {"weight": torch.tensor([[0.0, 1.0]])}]
    found = compute_fisher_spectrum(model, None, precomputed_gradients=given, max_sample_grad_norm=2.5)
    assert found.full.trace == pytest.approx((2.5**2 + 1) / 2)
    assert found.metadata["num_clipped"] == 1


SEEN: list[bool] = []


def watching(model: nn.Module, batch: Any) -> Tensor:
    SEEN.append(torch.are_deterministic_algorithms_enabled())
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_algorithms_inside_the_probe_only(before: bool):
    case = CASES["mlp"]
    SEEN.clear()
    try:
        torch.use_deterministic_algorithms(before, warn_only=before)
        spectra = compute_fisher_spectrum(case.model(), case.microbatches(), loss=watching, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert SEEN[-1]
    assert spectra.metadata["deterministic"]


def test_deterministic_algorithms_are_off_again_after_an_exception():
    case = CASES["mlp"]
    calls = []

    def failing(model: nn.Module, batch: Any) -> Tensor:
        calls.append(torch.are_deterministic_algorithms_enabled())
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        if calls[-1]:  # no deterministic algorithm, on any device
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return losses

    with pytest.raises(RuntimeError, match="deterministic"):
        compute_fisher_spectrum(case.model(), case.microbatches(), loss=failing, deterministic=True)
    assert calls[-1]
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_must_be_told_before_the_process_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ConfigurationError, match="CUBLAS_WORKSPACE_CONFIG"), deterministic_algorithms(torch.device("cuda")):
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic_algorithms(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


SCRIPT = f"""
import hashlib, torch
from torch import nn
from curvature_callbacks import compute_fisher_spectrum
torch.set_num_threads(1)
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding({VOCABULARY}, 6), nn.Flatten(), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 3))
    batch = torch.randint({VOCABULARY}, (7, 4)), torch.randint(3, (7,))
numbers = []
for fisher, unit in {TYPES[::2]}:
    draws = 3 if fisher == "sampled" else 1
    options = dict(fisher=fisher, sample_unit=unit, num_draws=draws, max_params_per_block=40, deterministic=True, seed=3)
    spectra = compute_fisher_spectrum(model, batch, loss="cross_entropy", **options)
    for spectrum in (spectra.full, *spectra.blocks.values()):
        numbers += spectrum.eigenvalues.tolist() + list(spectrum.metrics().values())
digest = hashlib.sha256(repr(numbers).encode()).hexdigest()
"""


def test_the_same_bits_in_every_process():
    here: dict[str, Any] = {}
    threads = torch.get_num_threads()
    try:
        exec(SCRIPT, here)
    finally:
        torch.set_num_threads(threads)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", f"{SCRIPT}\nprint(digest)"]
    there = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    assert there == here["digest"]


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
        compute_fisher_spectrum(model, CASES["mlp"].microbatches(), loss=watching, fisher=fisher, sample_unit=unit)
