"""Grams of sampled, exact and token-level Fishers against dense gradients of the same draws, one row at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.gram.context import GramOptions
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.surrogates import surrogates
from tests.cases import CASES
from tests.gram.gram_cases import block_grams_of
from tests.reference import IGNORED, float64_copy, relative_error, rows

FISHER_TYPES = {
    "empirical": FisherType(),
    "empirical token": FisherType(sample_unit="token", num_targets=2),
    "sampled": FisherType(fisher="sampled", num_draws=2),
    "sampled token": FisherType(fisher="sampled", sample_unit="token", num_targets=2, num_draws=2),
    "exact": FisherType(fisher="exact"),
    "exact token": FisherType(fisher="exact", sample_unit="token"),
}
TOLERANCE = 1e-5  # Hugging Face norms and losses compute in float32
SEED = 5


@dataclass(frozen=True)
class Model:
    """A model under one likelihood, its rows ragged over microbatches.

    Attributes:
        outputs: (T, C) logits of one row, those of position t for target t.
        targets: its T targets.
    """

    name: str
    likelihood: str
    loss: str | None
    build: Callable[[], nn.Module]
    microbatches: Callable[[], list[Any]]
    outputs: Callable[[nn.Module, Any], Tensor]
    targets: Callable[[Any], Tensor]


def labelled(name: str, *, kept: int | None = None) -> Callable[[], list[Any]]:
    """With targets at the first positions only, so that an exact Fisher takes few passes."""

    def build() -> list[Any]:
        microbatches = CASES[name].microbatches()
        for batch in microbatches if kept is not None else []:
            batch["labels"][:, kept:] = IGNORED
        microbatches[0]["labels"][2:] = microbatches[0]["labels"][2:] if kept is None else IGNORED
        return microbatches

    return build


def regression(targets: Callable[[Tensor], Tensor]) -> Callable[[], list[Any]]:
    def build() -> list[Any]:
        return [(x, targets(x[:, :3])) for x, _ in CASES["mlp"].microbatches()]

    return build


MODELS = {
    model.name: model
    for model in (
        Model(
            "gpt2",
            "categorical",
            None,
            CASES["gpt2"].model,
            labelled("gpt2", kept=4),
            lambda m, row: m(**row).logits[0, :-1],
            lambda row: row["labels"][0, 1:],
        ),
        Model(
            "bert_classifier",
            "categorical",
            None,
            CASES["bert_classifier"].model,
            labelled("bert_classifier"),
            lambda m, row: m(**row).logits,
            lambda row: row["labels"],
        ),
        Model(
            "mlp",
            "categorical",
            "cross_entropy",
            CASES["mlp"].model,
            CASES["mlp"].microbatches,
            lambda m, row: m(row[0]),
            lambda row: row[1],
        ),
        Model(
            "vit",
            "categorical",
            None,
            CASES["vit"].model,
            CASES["vit"].microbatches,
            lambda m, row: m(**row).logits,
            lambda row: row["labels"],
        ),
        Model(
            "mse", "gaussian", "mse", CASES["mlp"].model, regression(torch.sin), lambda m, row: m(row[0]), lambda row: row[1]
        ),
        Model(
            "bce",
            "bernoulli",
            "bce",
            CASES["mlp"].model,
            regression(lambda x: (x > 0).double()),
            lambda m, row: m(row[0]),
            lambda row: row[1],
        ),
    )
}


def grams(
    case: Model, fisher_type: FisherType, memory: GramMemory | None = None, structure: Any = "none"
) -> tuple[BlockGrams, list[Any]]:
    """And the surrogates of each microbatch."""
    model = case.build()
    with offline_problem(model, case.microbatches(), loss=case.loss, params_filter=None, block_structure=structure) as problem:
        drawn = [
            surrogates(fisher_type, problem.objective(batch), seed=SEED + place)
            for place, batch in enumerate(problem.microbatches)
        ]
        found = block_grams_of(problem, memory, seed=SEED, options=GramOptions(fisher_type=fisher_type))
    return found, drawn


def flat_gradient(value: Tensor, model: nn.Module, *, again: bool = False) -> Tensor:
    parameters = list(model.parameters())
    if not value.requires_grad:
        return torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True, retain_graph=again)
    return torch.cat([gradient.flatten() for gradient in found])


def scaled_gradient(case: Model, fisher_type: FisherType, model: nn.Module, row: Any, surrogate: Any, i: int) -> Tensor:
    """`g~` of row i in one pass, from what was drawn and the definition of the Fisher."""
    outputs, targets = case.outputs(model, row), case.targets(row)
    draws = surrogate.draws[i]
    scale = math.sqrt(float(surrogate.weights[i]))
    log_p = outputs.log_softmax(-1)
    if case.likelihood == "gaussian":
        D = outputs.shape[1]
        if fisher_type.fisher == "empirical":
            return flat_gradient(((outputs - targets) ** 2).mean(), model)
        noise = draws if fisher_type.fisher == "sampled" else F.one_hot(torch.tensor(surrogate.value.keywords["output"]), D)
        residual = noise.double() * math.sqrt(D / 2)  # y - f, for the exact one an axis of the noise
        return -flat_gradient(((outputs - (outputs.detach() + residual)) ** 2).mean(), model)
    if case.likelihood == "bernoulli":
        D, p = outputs.shape[1], outputs.sigmoid()
        if fisher_type.fisher == "empirical":
            return flat_gradient(-(targets * p.log() + (1 - targets) * (1 - p).log()).mean(), model)
        if fisher_type.fisher == "sampled":
            y = draws.double()
            return flat_gradient(-(y * p.log() + (1 - y) * (1 - p).log()).mean() * math.sqrt(D), model)
        d = surrogate.value.keywords["output"]
        return flat_gradient(outputs[0, d], model) * math.sqrt(float((p[0, d] * (1 - p[0, d])).detach()) / D)
    if fisher_type.fisher == "exact":
        t, c = surrogate.value.keywords["position"], surrogate.value.keywords["output"]
        return flat_gradient(-log_p[t, c], model) * math.exp(float(log_p[t, c].detach()) / 2)
    if fisher_type.fisher == "sampled" and fisher_type.sample_unit == "token":
        return flat_gradient(-log_p[draws[0], draws[1]], model) * scale
    if fisher_type.fisher == "sampled":
        valid = [(t, int(y)) for t, y in enumerate(draws.tolist()) if y != IGNORED]
        assert [t for t, _ in valid] == (targets != IGNORED).nonzero()[:, 0].tolist()
        return flat_gradient(-torch.stack([log_p[t, y] for t, y in valid]).sum(), model)
    if fisher_type.sample_unit == "token":
        return flat_gradient(-log_p[int(draws), int(targets[int(draws)])], model) * scale
    terms = [log_p[t, int(y)] for t, y in enumerate(targets.tolist()) if y != IGNORED]
    return flat_gradient(-torch.stack(terms).sum() if terms else outputs.sum() * 0, model)


def expected_gradients(case: Model, fisher_type: FisherType, drawn: list[Any]) -> tuple[Tensor, list[int], list[float]]:
    """(S, P), with row and weight of each pseudo-sample, pass after pass."""
    model, microbatches = float64_copy(case.build()), case.microbatches()
    gradients, samples, weights, start = [], [], [], 0
    for batch, chosen in zip(microbatches, drawn, strict=True):
        alone = list(rows([batch]))
        for surrogate in chosen:
            for i, row in enumerate(alone):
                if surrogate.active[i]:
                    gradients.append(scaled_gradient(case, fisher_type, model, row, surrogate, i))
                    samples.append(start + i)
                    weights.append(float(surrogate.weights[i]))
        start += len(alone)
    return torch.stack(gradients), samples, weights


ONE_TARGET = {"vit": ("sampled", "exact"), "bert_classifier": ("empirical", "exact token")}  # as of the mlp, which has all


@pytest.mark.parametrize(
    ("name", "fisher_type"), [(name, chosen) for name in MODELS for chosen in ONE_TARGET.get(name, FISHER_TYPES)]
)
def test_grams_are_those_of_the_same_draws(name: str, fisher_type: str):
    case = MODELS[name]
    found, drawn = grams(case, FISHER_TYPES[fisher_type])
    G, samples, weights = expected_gradients(case, FISHER_TYPES[fisher_type], drawn)
    (K,) = found.grams.values()
    expected = torch.tensor([[float(a @ b) for b in G] for a in G[:40]])[:40]
    assert K.shape == (len(G), len(G))
    assert relative_error(K[:40], expected) < TOLERANCE
    assert relative_error(K.diagonal(), (G**2).sum(1)) < TOLERANCE
    assert found.samples.tolist() == samples
    assert found.weights.tolist() == weights
    assert found.fallback == {}
    assert found.certificate_error is not None


@pytest.mark.parametrize(
    ("name", "fisher_type"),
    [*(("gpt2", fisher_type) for fisher_type in FISHER_TYPES), ("vit", "sampled"), ("mse", "sampled"), ("bce", "exact token")],
)
def test_row_by_row_has_the_same_draws(name: str, fisher_type: str):
    case = MODELS[name]
    ruled, _ = grams(case, FISHER_TYPES[fisher_type], structure="parameter")
    parameters = [parameter for parameter, _ in case.build().named_parameters()]
    refused = dict.fromkeys(parameters[::3], "for the test")
    by_row, _ = grams(case, FISHER_TYPES[fisher_type], GramMemory(refused=refused), structure="parameter")
    assert set(by_row.fallback) == set(refused)
    scale = max(K.abs().max().item() for K in ruled.grams.values())
    for block, K in ruled.grams.items():
        assert (by_row.grams[block] - K).abs().max().item() < TOLERANCE * scale, block
    assert torch.equal(by_row.samples, ruled.samples)
    assert torch.equal(by_row.weights, ruled.weights)


def dense_ggn(case: Model) -> tuple[Tensor, int]:
    """(P, P) `sum_it J' H J` with H of a target's loss in its outputs by autograd, and the number of targets."""
    model = float64_copy(case.build())
    function = {"gaussian": F.mse_loss, "bernoulli": F.binary_cross_entropy_with_logits}.get(case.likelihood, F.cross_entropy)
    total, count = torch.zeros(()), 0
    for row in rows(case.microbatches()):
        outputs, targets = case.outputs(model, row), case.targets(row)
        for output, target in zip(outputs, targets, strict=True):
            if case.likelihood == "categorical" and int(target) == IGNORED:
                continue
            H = torch.autograd.functional.hessian(partial(apart, function, target), output.detach())
            J = torch.stack([flat_gradient(entry, model, again=True) for entry in output])
            total = total + J.T @ H @ J
            count += 1
    return total, count


def apart(function: Callable[[Tensor, Tensor], Tensor], target: Tensor, output: Tensor) -> Tensor:
    return function(output, target)


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("name", ["mlp", "mse", "bce", "bert_classifier", "gpt2"])
def test_the_exact_fisher_is_the_ggn_of_the_mean_loss(name: str, unit: Any):
    """All its eigenvalues, and for one target a row both units."""
    case, fisher_type = MODELS[name], FisherType(fisher="exact", sample_unit=unit)
    found, drawn = grams(case, fisher_type)
    ggn, count = dense_ggn(case)
    (K,) = found.grams.values()
    G, *_ = expected_gradients(case, fisher_type, drawn)
    assert relative_error(G.T @ G / count, ggn / count) < TOLERANCE
    normaliser = fisher_type.normaliser(found.num_targets[found.num_targets > 0])
    assert normaliser == (count if unit == "token" else int((found.num_targets > 0).sum()))
    eigenvalues = torch.linalg.eigvalsh(K / normaliser).flip(0)
    top = torch.linalg.eigvalsh(ggn / normaliser).flip(0)[: len(eigenvalues)]
    assert relative_error(eigenvalues[: len(top)], top) < TOLERANCE
    assert found.weights.abs().max() == 0.0


@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mse", "bce"))])
def test_the_mean_of_sampled_fishers_is_the_exact_one(name: str):
    case = MODELS[name]
    ggn, count = dense_ggn(case)
    (K,) = grams(case, FisherType(fisher="sampled", num_draws=200))[0].grams.values()
    norms = K.diagonal().reshape(-1)
    standard_error = norms.std().item() / math.sqrt(len(norms))
    assert abs(norms.mean().item() - ggn.trace().item() / count) < 4 * standard_error
    assert standard_error < 0.1 * norms.mean().item()


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_all_targets_of_a_row_need_no_weights(fisher: Any):
    """Where the targets drawn are all there are, nothing is scaled up."""
    found, _ = grams(MODELS["gpt2"], FisherType(fisher=fisher, sample_unit="token", num_targets=16))
    assert torch.equal(found.weights, torch.ones_like(found.weights))
    assert len(found.samples) == int(found.num_targets.sum())


def test_a_sampled_fisher_depends_on_the_seed_and_not_on_the_global_generator():
    case, fisher_type = MODELS["gpt2"], FISHER_TYPES["sampled"]
    torch.manual_seed(1234)
    (first,) = grams(case, fisher_type)[0].grams.values()
    torch.manual_seed(4321)
    (again,) = grams(case, fisher_type)[0].grams.values()
    assert torch.equal(again, first)
    model = case.build()
    with offline_problem(model, case.microbatches(), loss=None, params_filter=None, block_structure="none") as problem:
        (other,) = block_grams_of(problem, seed=SEED + 100, options=GramOptions(fisher_type=fisher_type)).grams.values()
    assert not torch.allclose(other, again, rtol=1e-2)
