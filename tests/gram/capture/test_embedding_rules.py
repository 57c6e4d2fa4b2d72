"""Embeddings alone, summed, tied with heads and looked up in unusual ways, against the loop over rows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gram.capture.rule_cases import Parts, RuleCase, T, weight

IDS = {"shape": (T,), "vocabulary": 9}


def table(**options: Any) -> Parts:
    return {"table": nn.Embedding(9, 4, **options)}


def language_model(m: Any, ids: Tensor) -> Tensor:
    return F.linear(torch.tanh(m.inner(m.table(ids))), m.table.weight)


CASES = {
    "embedding": RuleCase(body=lambda m, ids: m.table(ids), parts=table, **IDS),
    "padding": RuleCase(body=lambda m, ids: m.table(ids), parts=lambda: table(padding_idx=2), **IDS),
    "padding from the end": RuleCase(body=lambda m, ids: m.table(ids), parts=lambda: table(padding_idx=-1), **IDS),
    "one index a row": RuleCase(body=lambda m, ids: m.table(ids[:, 0]), parts=table, **IDS),
    "grid of indices": RuleCase(body=lambda m, ids: m.table(ids), parts=table, shape=(2, 3), vocabulary=9),
    "by keyword": RuleCase(
        body=lambda m, ids: F.embedding(weight=m.table.weight, input=ids, padding_idx=1), parts=table, **IDS
    ),
    "by indexing": RuleCase(
        body=lambda m, ids: m.weight[ids], parts=lambda: {"weight": weight(9, 4)}, by_row=("weight",), **IDS
    ),
    "by index_select": RuleCase(
        body=lambda m, ids: m.weight.index_select(0, ids.flatten()).reshape(len(ids), -1),
        parts=lambda: {"weight": weight(9, 4)},
        by_row=("weight",),
        **IDS,
    ),
    "by gather": RuleCase(
        body=lambda m, ids: torch.gather(m.weight.expand(len(ids), -1), 1, ids), parts=lambda: {"weight": weight(9)}, **IDS
    ),
    "by one-hot product": RuleCase(
        body=lambda m, ids: F.one_hot(ids, 9).to(m.weight.dtype) @ m.weight, parts=lambda: {"weight": weight(9, 4)}, **IDS
    ),
    "scaled by a constant": RuleCase(body=lambda m, ids: m.table(ids) * 2.0, parts=table, **IDS),
    "a scaled table": RuleCase(body=lambda m, ids: F.embedding(ids, m.table.weight * 2.0), parts=table, **IDS),
    "a normalised table": RuleCase(
        body=lambda m, ids: F.embedding(ids, F.normalize(m.table.weight, dim=-1)), parts=table, **IDS
    ),
    "a factorised table": RuleCase(
        body=lambda m, ids: F.embedding(ids, m.outer @ m.inner),
        parts=lambda: {"outer": weight(9, 2), "inner": weight(2, 4)},
        **IDS,
    ),
    "two tables": RuleCase(
        body=lambda m, ids: m.table(ids) + m.other(ids.roll(1, 1) % 5),
        parts=lambda: table() | {"other": nn.Embedding(5, 4)},
        **IDS,
    ),
    "the same table twice": RuleCase(body=lambda m, ids: m.table(ids) + torch.sin(m.table(ids.roll(1, 1))), parts=table, **IDS),
    "words, positions and types": RuleCase(
        body=lambda m, ids: m.norm(
            m.table(ids) + m.positions(torch.arange(ids.shape[1])[None]) + m.types(torch.zeros_like(ids))
        ),
        parts=lambda: table() | {"positions": nn.Embedding(7, 4), "types": nn.Embedding(2, 4), "norm": nn.LayerNorm(4)},
        **IDS,
    ),
    "tied head": RuleCase(body=language_model, parts=lambda: table() | {"inner": nn.Linear(4, 4)}, **IDS),
    "tied head, padded": RuleCase(body=language_model, parts=lambda: table(padding_idx=0) | {"inner": nn.Linear(4, 4)}, **IDS),
    "tied head by matmul": RuleCase(body=lambda m, ids: torch.sin(m.table(ids)) @ m.table.weight.mT, parts=table, **IDS),
    "tied by scaled rows": RuleCase(
        body=lambda m, ids: F.linear(m.table(ids) * m.gain, m.table.weight * 0.5, m.bias),
        parts=lambda: table() | {"gain": weight(4), "bias": weight(9)},
        **IDS,
    ),
    "positions first": RuleCase(
        body=lambda m, ids: m.table(ids.t()).transpose(0, 1), parts=table, shape=(6,), vocabulary=9, by_row=...
    ),
    "flattened": RuleCase(body=lambda m, ids: m.table(ids.flatten()).reshape(len(ids), -1), parts=table, **IDS),
    "of unique indices": RuleCase(body=lambda m, ids: unique(m, ids), parts=table, by_row=..., **IDS),
    "bag": RuleCase(
        body=lambda m, ids: m.bag(ids), parts=lambda: {"bag": nn.EmbeddingBag(9, 4, mode="sum")}, by_row=..., **IDS
    ),
    "bag of means": RuleCase(
        body=lambda m, ids: m.bag(ids), parts=lambda: {"bag": nn.EmbeddingBag(9, 4, padding_idx=3)}, by_row=..., **IDS
    ),
}


def unique(m: Any, ids: Tensor) -> Tensor:
    """Every index is looked up once, whichever rows hold it."""
    present, place = ids.unique(return_inverse=True)
    return m.table(present)[place]


@pytest.mark.parametrize("name", CASES)
def test_embeddings(name: str):
    CASES[name].assert_exact()


@pytest.mark.parametrize("name", ["embedding", "padding", "by indexing", "tied head"])
def test_rows_alone_in_their_microbatch(name: str):
    CASES[name].assert_exact(sizes=(1, 1, 1))
