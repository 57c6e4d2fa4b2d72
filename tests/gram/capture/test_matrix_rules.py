"""Matrix products written in every way against the loop over rows."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gram.capture.rule_cases import Parts, RuleCase, T, weight


def matrix() -> Parts:
    return {"weight": weight(4, 3)}


def biased() -> Parts:
    return {"weight": weight(4, 3), "bias": weight(3)}


HEADS = (2, T, 4)  # (heads, positions, width)

PRODUCTS = {
    "linear of vectors": RuleCase(body=lambda m, x: m.layer(x), parts=lambda: {"layer": nn.Linear(4, 3)}, shape=(4,)),
    "linear of positions": RuleCase(body=lambda m, x: m.layer(x), parts=lambda: {"layer": nn.Linear(4, 3)}),
    "linear of heads": RuleCase(body=lambda m, x: m.layer(x), parts=lambda: {"layer": nn.Linear(4, 3)}, shape=HEADS),
    "linear without bias": RuleCase(body=lambda m, x: m.layer(x), parts=lambda: {"layer": nn.Linear(4, 3, bias=False)}),
    "linear by keyword": RuleCase(body=lambda m, x: F.linear(input=x, bias=m.bias, weight=m.weight.t()), parts=biased),
    "linear with a transposed weight": RuleCase(body=lambda m, x: F.linear(x, m.weight.t()), parts=matrix),
    "linear with a weight's mT": RuleCase(body=lambda m, x: F.linear(x, m.weight.mT), parts=matrix),
    "linear with a flattened batch": RuleCase(
        body=lambda m, x: m.layer(x.reshape(-1, 4)).reshape(len(x), -1), parts=lambda: {"layer": nn.Linear(4, 3)}
    ),
    "x @ W": RuleCase(body=lambda m, x: x @ m.weight, parts=matrix),
    "x @ W of vectors": RuleCase(body=lambda m, x: x @ m.weight + m.bias, parts=biased, shape=(4,)),
    "x @ W.T": RuleCase(body=lambda m, x: x @ m.weight.T, parts=lambda: {"weight": weight(3, 4)}),
    "x @ w": RuleCase(body=lambda m, x: x @ m.weight, parts=lambda: {"weight": weight(4)}),
    "torch.matmul": RuleCase(body=lambda m, x: torch.matmul(x, m.weight), parts=matrix),
    "Tensor.matmul": RuleCase(body=lambda m, x: x.matmul(m.weight), parts=matrix),
    "W @ x": RuleCase(body=lambda m, x: m.weight @ x, parts=lambda: {"weight": weight(3, 5)}, shape=(5, T)),
    "torch.matmul(W, x)": RuleCase(body=lambda m, x: torch.matmul(m.weight, x.mT), parts=lambda: {"weight": weight(3, 4)}),
    "W.t() @ x": RuleCase(body=lambda m, x: m.weight.t() @ x.mT, parts=matrix),
    "w @ x": RuleCase(body=lambda m, x: m.weight @ x, parts=lambda: {"weight": weight(5)}, shape=(5, 4), by_row=("weight",)),
    "token mixing": RuleCase(body=lambda m, x: m.layer(x.mT).mT, parts=lambda: {"layer": nn.Linear(5, 3)}, shape=(5, 4)),
    "x @ W for each head": RuleCase(body=lambda m, x: x @ m.weight, parts=lambda: {"weight": weight(2, 4, 3)}, shape=HEADS),
    "x @ W[None] for each head": RuleCase(
        body=lambda m, x: torch.matmul(x, m.weight[None]), parts=lambda: {"weight": weight(2, 4, 3)}, shape=HEADS
    ),
    "mm": RuleCase(body=lambda m, x: torch.mm(x, m.weight), parts=matrix, shape=(4,)),
    "mm of a flattened batch": RuleCase(body=lambda m, x: x.flatten(0, 1).mm(m.weight).reshape(len(x), -1), parts=matrix),
    "mv of a flattened batch": RuleCase(
        body=lambda m, x: torch.mv(x.flatten(0, 1), m.weight).reshape(len(x), -1),
        parts=lambda: {"weight": weight(4)},
        by_row=("weight",),
    ),
    "addmm": RuleCase(body=lambda m, x: torch.addmm(m.bias, x, m.weight), parts=biased, shape=(4,)),
    "addmm of a flattened batch": RuleCase(
        body=lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.weight).reshape(len(x), -1), parts=biased
    ),
    "addmm with alpha and beta": RuleCase(
        body=lambda m, x: torch.addmm(m.bias, x, m.weight, beta=0.5, alpha=2),
        parts=biased,
        shape=(4,),
        by_row=("weight", "bias"),
    ),
    "addmm onto a residual": RuleCase(
        body=lambda m, x: torch.addmm(x[:, :3], x, m.weight), parts=matrix, shape=(4,), by_row=("weight",)
    ),
    "bmm with an expanded weight": RuleCase(body=lambda m, x: torch.bmm(x, m.weight.expand(len(x), -1, -1)), parts=matrix),
    "bmm with a repeated weight": RuleCase(
        body=lambda m, x: torch.bmm(m.weight[None].repeat(len(x), 1, 1), x.mT), parts=lambda: {"weight": weight(3, 4)}
    ),
    "baddbmm": RuleCase(
        body=lambda m, x: torch.baddbmm(m.bias, x, m.weight.expand(len(x), -1, -1)), parts=biased, by_row=("bias",)
    ),
    "einsum ntd,de->nte": RuleCase(body=lambda m, x: torch.einsum("ntd,de->nte", x, m.weight), parts=matrix),
    "einsum de,ntd->nte": RuleCase(body=lambda m, x: torch.einsum("de,ntd->nte", m.weight, x), parts=matrix),
    "einsum nd,de->ne": RuleCase(body=lambda m, x: torch.einsum("nd,de->ne", x, m.weight), parts=matrix, shape=(4,)),
    "einsum ...d,ed->...e": RuleCase(
        body=lambda m, x: torch.einsum("...d,ed->...e", x, m.weight),
        parts=lambda: {"weight": weight(3, 4)},
        by_row=("weight",),
    ),
    "einsum, operands apart": RuleCase(body=lambda m, x: torch.einsum(x, [0, 1, 2], m.weight, [2, 3], [0, 1, 3]), parts=matrix),
    "einsum splits into heads": RuleCase(
        body=lambda m, x: torch.einsum("ntd,dhk->nhtk", x, m.weight), parts=lambda: {"weight": weight(4, 2, 3)}
    ),
    "einsum joins heads": RuleCase(
        body=lambda m, x: torch.einsum("nhtk,hkd->ntd", x, m.weight), parts=lambda: {"weight": weight(2, 4, 3)}, shape=HEADS
    ),
    "einsum for each head": RuleCase(
        body=lambda m, x: torch.einsum("nhtk,hkj->nhtj", x, m.weight), parts=lambda: {"weight": weight(2, 4, 3)}, shape=HEADS
    ),
    "einsum scales": RuleCase(body=lambda m, x: torch.einsum("ntd,d->ntd", x, m.scale), parts=lambda: {"scale": weight(4)}),
    "einsum sums positions": RuleCase(body=lambda m, x: torch.einsum("ntd,de->ne", x, m.weight), parts=matrix),
    "einsum of two activations": RuleCase(
        body=lambda m, x: torch.einsum("nti,ijk,ntj->ntk", x, m.weight, torch.sin(x)), parts=lambda: {"weight": weight(4, 4, 2)}
    ),
    "einsum of two parameters": RuleCase(
        body=lambda m, x: torch.einsum("ntd,dr,re->nte", x, m.down, m.up),
        parts=lambda: {"down": weight(4, 2), "up": weight(2, 3)},
    ),
    "tensordot": RuleCase(body=lambda m, x: torch.tensordot(x, m.weight, dims=1), parts=matrix, by_row=("weight",)),
    "tensordot over two axes": RuleCase(
        body=lambda m, x: torch.tensordot(x, m.weight, dims=([2, 1], [0, 1])),
        parts=lambda: {"weight": weight(4, 5, 3)},
        shape=(5, 4),
        by_row=("weight",),
    ),
    "bilinear layer": RuleCase(
        body=lambda m, x: m.layer(x, torch.sin(x)[..., :2]), parts=lambda: {"layer": nn.Bilinear(4, 2, 3)}
    ),
    "bilinear layer of vectors": RuleCase(
        body=lambda m, x: m.layer(x, torch.sin(x)), parts=lambda: {"layer": nn.Bilinear(4, 4, 2)}, shape=(4,)
    ),
    "bilinear form": RuleCase(body=lambda m, x: x @ m.weight @ x.mT, parts=lambda: {"weight": weight(4, 4)}),
    "fused and chunked": RuleCase(
        body=lambda m, x: F.linear(x, m.weight.chunk(2)[0], m.bias.chunk(2)[0]) * F.linear(x, m.weight.chunk(2)[1]),
        parts=lambda: {"weight": weight(6, 4), "bias": weight(6)},
    ),
    "in slices": RuleCase(
        body=lambda m, x: F.linear(x, m.weight[:2], m.bias[:2]).sum(-1) + F.linear(x, m.weight[1:], m.bias[1:]).sum(-1),
        parts=lambda: {"weight": weight(5, 4), "bias": weight(5)},
    ),
    "one row at a time": RuleCase(
        body=lambda m, x: torch.stack([(x * row).sum(-1) for row in m.weight], -1), parts=lambda: {"weight": weight(3, 4)}
    ),
    "called three times": RuleCase(body=lambda m, x: repeated(m, x), parts=lambda: {"layer": nn.Linear(4, 4)}),
    "autoencoder, tied and transposed": RuleCase(
        body=lambda m, x: F.linear(torch.tanh(F.linear(x, m.weight, m.bias)), m.weight.t()),
        parts=lambda: {"weight": weight(3, 4), "bias": weight(3)},
    ),
    "tied x @ W and linear": RuleCase(
        body=lambda m, x: F.linear(torch.tanh(x @ m.weight), m.weight), parts=lambda: {"weight": weight(4, 3)}
    ),
    "checkpointed": RuleCase(
        body=lambda m, x: torch.utils.checkpoint.checkpoint(m.layer, x, use_reentrant=False),
        parts=lambda: {"layer": nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))},
    ),
    "checkpointed, reentrant": RuleCase(  # the oracle runs it too, and torch warns there when no input needs a gradient
        body=lambda m, x: torch.utils.checkpoint.checkpoint(m.layer, x + 0.0 * m.layer[0].bias.sum(), use_reentrant=True),
        parts=lambda: {"layer": nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))},
    ),
    "in-place activation": RuleCase(body=lambda m, x: m.layer(x).relu_().square(), parts=lambda: {"layer": nn.Linear(4, 3)}),
    "in-place residual": RuleCase(body=lambda m, x: m.layer(x).add_(x).mul_(2), parts=lambda: {"layer": nn.Linear(4, 4)}),
}


def repeated(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.tanh(m.layer(x))
    return x


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, stem: bool):
    PRODUCTS[name].assert_exact(stem=stem)


@pytest.mark.parametrize("name", ["x @ W", "W @ x", "bmm with an expanded weight", "einsum splits into heads"])
def test_rows_alone_in_their_microbatch(name: str):
    PRODUCTS[name].assert_exact(sizes=(1, 1, 1))
