"""Weights that are functions of the parameters (reparametrised, merged, adapted) against the loop over rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from tests.gram.capture.rule_cases import RuleCase, T, weight


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "weight norm of a linear": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (T, 4)),
    "weight norm of a linear's columns": (lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=1), (T, 4)),
    "weight norm of a linear as a whole": (lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=None), (T, 4)),
    "weight norm of a conv1d": (lambda: parametrizations.weight_norm(nn.Conv1d(4, 3, 3), dim=2), (4, 7)),
    "weight norm of a grouped conv1d": (
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1, groups=2), dim=2),
        (4, 7),
    ),
    "weight norm of a conv2d": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), (2, 5, 4)),
    "spectral norm of a linear": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), (T, 4)),
    "spectral norm of a conv2d": (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)), (2, 5, 4)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), (T, 4)),
    "symmetric": (lambda: symmetric(nn.Linear(4, 4)), (T, 4)),
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", LAYERS)
def test_reparametrised_layers(name: str, stem: bool):
    layer, shape = LAYERS[name]
    RuleCase(body=lambda m, x: m.layer(x), parts=lambda: {"layer": layer()}, shape=shape).assert_exact(stem=stem)


def adapter() -> dict[str, Any]:
    return {"base": frozen(nn.Linear(4, 3)), "down": weight(2, 4), "up": weight(3, 2)}


def hypernetwork(m: Any, x: Tensor) -> Tensor:
    generated = torch.tanh(m.code @ m.generator).reshape(3, 4)
    return F.linear(x, generated)


def shared(m: Any, x: Tensor) -> Tensor:
    computed = F.normalize(m.weight, dim=-1)
    return F.linear(torch.tanh(F.linear(x, computed)), computed)


DERIVED = {
    "adapter beside a frozen linear": RuleCase(
        body=lambda m, x: m.base(x) + 2.0 * F.linear(F.linear(x, m.down), m.up), parts=adapter
    ),
    "adapter merged into a frozen weight": RuleCase(
        body=lambda m, x: F.linear(x, m.base.weight + 2.0 * (m.up @ m.down), m.base.bias), parts=adapter
    ),
    "adapter merged into a trained weight": RuleCase(
        body=lambda m, x: F.linear(x, m.base.weight + m.up @ m.down, m.base.bias),
        parts=lambda: {"base": nn.Linear(4, 3), "down": weight(2, 4), "up": weight(3, 2)},
    ),
    "adapter by addmm": RuleCase(body=lambda m, x: F.linear(x, torch.addmm(m.base.weight, m.up, m.down)), parts=adapter),
    "adapter with a learned magnitude": RuleCase(
        body=lambda m, x: F.linear(x, m.size[:, None] * F.normalize(m.base.weight + m.up @ m.down, dim=1)),
        parts=lambda: adapter() | {"size": weight(3)},
    ),
    "trained over a frozen trunk": RuleCase(
        body=lambda m, x: m.head(torch.tanh(m.trunk(x))),
        parts=lambda: {"trunk": frozen(nn.Linear(4, 3)), "head": nn.Linear(3, 3)},
    ),
    "bias alone": RuleCase(
        body=lambda m, x: F.linear(x, m.base.weight, m.bias), parts=lambda: {"base": frozen(nn.Linear(4, 3)), "bias": weight(3)}
    ),
    "rescaled": RuleCase(
        body=lambda m, x: F.linear(x, m.weight * 0.5, m.bias * 2.0), parts=lambda: {"weight": weight(3, 4), "bias": weight(3)}
    ),
    "divided by its norm": RuleCase(
        body=lambda m, x: F.linear(x, m.weight / m.weight.norm(dim=1, keepdim=True)), parts=lambda: {"weight": weight(3, 4)}
    ),
    "cosine classifier": RuleCase(
        body=lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.weight)) * m.scale.exp(),
        parts=lambda: {"weight": weight(3, 4), "scale": weight()},
    ),
    "computed once, used twice": RuleCase(body=shared, parts=lambda: {"weight": weight(4, 4)}),
    "computed once, used by a product and a scale": RuleCase(
        body=lambda m, x: (x @ (both := m.weight.exp())) * both[0], parts=lambda: {"weight": weight(4, 4)}
    ),
    "computed and as it is": RuleCase(
        body=lambda m, x: F.linear(torch.tanh(F.linear(x, m.weight.sin())), m.weight), parts=lambda: {"weight": weight(4, 4)}
    ),
    "masked": RuleCase(
        body=lambda m, x: F.linear(x, m.weight * m.mask),
        parts=lambda: {"weight": weight(3, 4), "mask": nn.Buffer(torch.rand(3, 4) > 0.5)},
    ),
    "lower triangle": RuleCase(
        body=lambda m, x: torch.tril(m.weight) @ x, parts=lambda: {"weight": weight(5, 5)}, shape=(5, 4)
    ),
    "concatenated": RuleCase(
        body=lambda m, x: F.linear(x, torch.cat([m.query.weight, m.key.weight]), torch.cat([m.query.bias, m.key.bias])),
        parts=lambda: {"query": nn.Linear(4, 2), "key": nn.Linear(4, 3)},
    ),
    "stacked": RuleCase(
        body=lambda m, x: x @ torch.stack([m.first, m.second], 1), parts=lambda: {"first": weight(4), "second": weight(4)}
    ),
    "interpolated between two": RuleCase(
        body=lambda m, x: F.linear(x, torch.lerp(m.first, m.second, m.mix.sigmoid())),
        parts=lambda: {"first": weight(3, 4), "second": weight(3, 4), "mix": weight()},
    ),
    "quantised, straight through": RuleCase(
        body=lambda m, x: F.linear(x, m.weight + (torch.round(m.weight * 8) / 8 - m.weight).detach()),
        parts=lambda: {"weight": weight(3, 4)},
    ),
    "generated": RuleCase(body=hypernetwork, parts=lambda: {"code": weight(3), "generator": weight(3, 12)}),
    "generated by a layer": RuleCase(
        body=lambda m, x: F.linear(x, torch.tanh(m.generator(m.code)).reshape(3, 4)),
        parts=lambda: {"code": weight(1, 3), "generator": nn.Linear(3, 12)},
    ),
    "a layer on parameters and on activations": RuleCase(
        body=lambda m, x: m.layer(x) @ m.layer(m.code).mT, parts=lambda: {"layer": nn.Linear(4, 3), "code": weight(5, 4)}
    ),
    "as many codes as rows": RuleCase(
        body=lambda m, x: m.layer(x) @ m.layer(m.code).mT, parts=lambda: {"layer": nn.Linear(4, 3), "code": weight(3, 4)}
    ),
    "a convolution of parameters": RuleCase(
        body=lambda m, x: F.linear(x, m.layer(m.code)[0].reshape(3, 4)),
        parts=lambda: {"layer": nn.Conv1d(2, 3, 2), "code": weight(1, 2, 5)},
    ),
    "matrix exponential": RuleCase(
        body=lambda m, x: x @ torch.matrix_exp(m.weight - m.weight.mT), parts=lambda: {"weight": weight(4, 4)}
    ),
    "chosen for each row": RuleCase(
        body=lambda m, x: torch.einsum("nd,nde->ne", x, torch.einsum("nk,kde->nde", F.softmax(m.route(x), -1), m.weights)),
        parts=lambda: {"route": nn.Linear(4, 2), "weights": weight(2, 4, 3)},
        shape=(4,),
    ),
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", DERIVED)
def test_derived_weights(name: str, stem: bool):
    DERIVED[name].assert_exact(stem=stem)
