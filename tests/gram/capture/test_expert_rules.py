"""Mixtures of experts: fused three-dimensional weights and routers against the loop over rows, tokens or none for an expert."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import Case, causal_batch
from tests.families import family
from tests.gram.capture.rule_cases import RuleCase, assert_exact, assert_no_fallback, parameter_grams, weight
from tests.reference import sample_gradients

COUNTS = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
}


def expert_case(name: str, experts: int) -> Case:
    options: dict[str, Any] = {COUNTS[name]: experts, "num_hidden_layers": 2 if name == "deepseek_v3" else 1}
    return Case(name, "causal", lambda: family(name, **options), causal_batch)


def idle_experts(truth: dict[str, Tensor], experts: int) -> int:
    """Experts whose weights no sample has a gradient for."""
    (fused,) = (G for name, G in truth.items() if name.endswith("down_proj") and "experts" in name and "shared" not in name)
    return int((fused.reshape(len(fused), experts, -1) == 0).all(2).all(0).sum())


@pytest.mark.parametrize("name", COUNTS)
def test_every_expert_receives_tokens(name: str):
    case = expert_case(name, 3)
    model, microbatches = case.model(), case.microbatches((3, 1, 2))
    truth = sample_gradients(model, microbatches, case.kind)
    found = parameter_grams(model, microbatches, None)
    assert idle_experts(truth, 3) == 0
    assert_exact(found, truth, model, 1e-5)
    assert_no_fallback(found)


@pytest.mark.parametrize("name", COUNTS)
def test_some_experts_receive_none(name: str):
    case = expert_case(name, 32)
    model, microbatches = case.model(), case.microbatches((1, 1, 2))
    truth = sample_gradients(model, microbatches, case.kind)
    found = parameter_grams(model, microbatches, None)
    assert 0 < idle_experts(truth, 32) < 32
    assert_exact(found, truth, model, 1e-5)
    assert_no_fallback(found)


def routed(m: Any, x: Tensor, expert: Any) -> Tensor:
    """Each token takes its best expert; tokens of all rows are gathered."""
    tokens = x.flatten(0, 1)
    gates = torch.softmax(F.linear(tokens, m.router), -1)
    weights, chosen = gates.max(-1)
    output = torch.zeros(len(tokens), 3, dtype=x.dtype)
    for index in range(m.router.shape[0]):
        place = torch.where(chosen == index)[0]
        output.index_add_(0, place, expert(m, index, tokens[place]) * weights[place, None])
    return output.reshape(len(x), -1, 3)


def selected(m: Any, x: Tensor) -> Tensor:
    """Each token's own weights gathered: (tokens, d_out, d_in)."""
    tokens = x.flatten(0, 1)
    weights, chosen = torch.softmax(F.linear(tokens, m.router), -1).max(-1)
    hidden = torch.bmm(m.fused[chosen], tokens[:, :, None])[..., 0] + m.bias[chosen]
    return (hidden * weights[:, None]).reshape(len(x), -1, 3)


def dense(m: Any, x: Tensor) -> Tensor:
    """All experts for every token, as GPT-OSS and Llama 4 do with batched products: experts on axis 0."""
    tokens = x.flatten(0, 1)
    gates = torch.softmax(F.linear(tokens, m.router), -1)
    hidden = torch.bmm(tokens.repeat(3, 1).view(3, -1, 4), m.fused.mT) + m.bias[:, None]
    return (hidden * gates.T[..., None]).sum(0).reshape(len(x), -1, 3)


def fused() -> dict[str, Any]:
    return {"router": weight(3, 4), "fused": weight(3, 3, 4), "bias": weight(3, 3)}


WRITTEN = {
    "fused, indexed": RuleCase(body=lambda m, x: routed(m, x, lambda m, e, h: F.linear(h, m.fused[e], m.bias[e])), parts=fused),
    "fused, indexed by a tensor": RuleCase(
        body=lambda m, x: routed(m, x, lambda m, e, h: F.linear(h, m.fused[torch.tensor(e)]) + m.bias[torch.tensor(e)]),
        parts=fused,
    ),
    "fused, transposed": RuleCase(
        body=lambda m, x: routed(m, x, lambda m, e, h: h @ m.fused[e].T + m.bias[e]), parts=fused, by_row=("fused",)
    ),
    "a list of linears": RuleCase(
        body=lambda m, x: routed(m, x, lambda m, e, h: m.experts[e](h)),
        parts=lambda: {"router": weight(3, 4), "experts": nn.ModuleList(nn.Linear(4, 3) for _ in range(3))},
    ),
    "weights gathered for each token": RuleCase(body=selected, parts=fused, by_row=("fused", "bias")),
    "all experts for all tokens": RuleCase(body=dense, parts=fused, by_row=("fused", "bias")),
    "all experts by einsum": RuleCase(
        body=lambda m, x: torch.einsum(
            "nte,nteo->nto", torch.softmax(x @ m.router.T, -1), torch.einsum("ntd,eod->nteo", x, m.fused) + m.bias
        ),
        parts=fused,
    ),
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", WRITTEN)
def test_experts_written_out(name: str, stem: bool):
    WRITTEN[name].assert_exact(stem=stem)
