"""Parameters that stand in for inputs (class tokens, prompts, positions) against the loop over rows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gram.capture.rule_cases import RuleCase, weight


def before(token: Tensor, x: Tensor) -> Tensor:
    return torch.cat([token, x], 1)


TOKENS = {
    "expanded with -1": RuleCase(
        body=lambda m, x: before(m.token.expand(len(x), -1, -1), x), parts=lambda: {"token": weight(1, 1, 4)}
    ),
    "expanded with sizes": RuleCase(
        body=lambda m, x: before(m.token.expand(x.shape[0], 2, 4), x), parts=lambda: {"token": weight(1, 2, 4)}
    ),
    "expanded from a vector": RuleCase(
        body=lambda m, x: before(m.token.expand(len(x), 1, 4), x), parts=lambda: {"token": weight(4)}
    ),
    "expanded to a size in a list": RuleCase(
        body=lambda m, x: before(m.token.expand([len(x), 1, 4]), x), parts=lambda: {"token": weight(1, 1, 4)}
    ),
    "indexed by None": RuleCase(
        body=lambda m, x: before(m.token[None].expand(len(x), -1, -1), x), parts=lambda: {"token": weight(2, 4)}
    ),
    "unsqueezed": RuleCase(
        body=lambda m, x: before(m.token.unsqueeze(0).unsqueeze(0).expand(len(x), -1, -1), x),
        parts=lambda: {"token": weight(4)},
    ),
    "repeated": RuleCase(body=lambda m, x: before(m.token.repeat(len(x), 1, 1), x), parts=lambda: {"token": weight(1, 1, 4)}),
    "repeated along positions too": RuleCase(
        body=lambda m, x: before(m.token.repeat(len(x), 3, 1), x), parts=lambda: {"token": weight(1, 1, 4)}
    ),
    "torch.broadcast_to": RuleCase(
        body=lambda m, x: before(torch.broadcast_to(m.token, (len(x), 1, 4)), x), parts=lambda: {"token": weight(1, 1, 4)}
    ),
    "repeat_interleaved": RuleCase(
        body=lambda m, x: before(m.token.repeat_interleave(len(x), 0), x), parts=lambda: {"token": weight(1, 1, 4)}
    ),
    "stacked": RuleCase(body=lambda m, x: before(torch.stack([m.token] * len(x)), x), parts=lambda: {"token": weight(1, 4)}),
    "expanded like the input": RuleCase(
        body=lambda m, x: torch.cat([m.token.expand_as(x), x], -1), parts=lambda: {"token": weight(1, 1, 4)}
    ),
    "added to zeros": RuleCase(
        body=lambda m, x: before(x.new_zeros(len(x), 1, 4) + m.token, x), parts=lambda: {"token": weight(1, 1, 4)}
    ),
    "class, registers and positions": RuleCase(
        body=lambda m, x: torch.cat(
            [
                before(m.token.expand(len(x), -1, -1), x) + m.positions[:, : x.shape[1] + 1],
                m.registers.expand(len(x), -1, -1),
            ],
            1,
        ),
        parts=lambda: {"token": weight(1, 1, 4), "registers": weight(1, 3, 4), "positions": weight(1, 9, 4)},
        dead=(),
    ),
    "mask token by where": RuleCase(
        body=lambda m, x: torch.where(x[..., :1] > 0, m.token.to(x.dtype).unsqueeze(0), x),
        parts=lambda: {"token": weight(1, 4)},
    ),
    "mask token by product": RuleCase(
        body=lambda m, x: x * (x[..., :1] > 0) + m.token * (x[..., :1] <= 0), parts=lambda: {"token": weight(1, 1, 4)}
    ),
    "mask token by assignment": RuleCase(body=lambda m, x: masked(m, x), parts=lambda: {"token": weight(4)}, by_row=...),
    "soft prompt through a layer": RuleCase(
        body=lambda m, x: m.layer(before(m.prompt.expand(len(x), -1, -1), x)),
        parts=lambda: {"prompt": weight(1, 3, 4), "layer": nn.Linear(4, 3)},
    ),
    "initial state of a recurrence": RuleCase(
        body=lambda m, x: recurrence(m, x),
        parts=lambda: {"state": weight(3), "inner": nn.Linear(4, 3), "outer": nn.Linear(3, 3)},
    ),
    "prototypes": RuleCase(
        body=lambda m, x: torch.cdist(x, m.prototypes.expand(len(x), -1, -1)), parts=lambda: {"prototypes": weight(1, 3, 4)}
    ),
    "radial basis by broadcasting": RuleCase(
        body=lambda m, x: torch.exp(-((x[:, :, None] - m.centres) ** 2).sum(-1) * m.width.exp()),
        parts=lambda: {"centres": weight(3, 4), "width": weight(3)},
    ),
}


def masked(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[x[..., 0] > 0] = m.token
    return x


def recurrence(m: Any, x: Tensor) -> Tensor:
    state = m.state.expand(len(x), -1)
    for t in range(x.shape[1]):
        state = torch.tanh(m.inner(x[:, t]) + m.outer(state))
    return state


POSITIONS = {
    "added": RuleCase(body=lambda m, x: x + m.positions, parts=lambda: {"positions": weight(1, 5, 4)}, shape=(5, 4)),
    "added without leading axis": RuleCase(
        body=lambda m, x: m.positions + x, parts=lambda: {"positions": weight(5, 4)}, shape=(5, 4)
    ),
    "added in place": RuleCase(
        body=lambda m, x: x.clone().add_(m.positions), parts=lambda: {"positions": weight(1, 5, 4)}, shape=(5, 4)
    ),
    "sliced": RuleCase(body=lambda m, x: x + m.positions[:, : x.shape[1]], parts=lambda: {"positions": weight(1, 7, 4)}),
    "sliced without leading axis": RuleCase(
        body=lambda m, x: x + m.positions[: x.shape[1]], parts=lambda: {"positions": weight(7, 4)}
    ),
    "narrowed": RuleCase(
        body=lambda m, x: x + m.positions.narrow(1, 0, x.shape[1]), parts=lambda: {"positions": weight(1, 7, 4)}
    ),
    "apart for the first": RuleCase(
        body=lambda m, x: torch.cat([x[:, :1] + m.positions[:, :1], x[:, 1:] + m.positions[:, 1 : x.shape[1]]], 1),
        parts=lambda: {"positions": weight(1, 7, 4)},
    ),
    "an embedding's weight, sliced": RuleCase(
        body=lambda m, x: x + m.table.weight[: x.shape[1]], parts=lambda: {"table": nn.Embedding(7, 4)}
    ),
    "looked up without sample axis": RuleCase(
        body=lambda m, x: x + m.table(torch.arange(x.shape[1])), parts=lambda: {"table": nn.Embedding(7, 4)}
    ),
    "looked up with sample axis 1": RuleCase(
        body=lambda m, x: x + m.table(torch.arange(x.shape[1])[None]), parts=lambda: {"table": nn.Embedding(7, 4)}
    ),
    "looked up with expanded indices": RuleCase(
        body=lambda m, x: x + m.table(torch.arange(x.shape[1]).expand(len(x), -1)), parts=lambda: {"table": nn.Embedding(7, 4)}
    ),
    "as many positions as rows": RuleCase(
        body=lambda m, x: x + m.table(torch.arange(3)) + m.positions,
        parts=lambda: {"table": nn.Embedding(3, 4), "positions": weight(3, 4)},
        shape=(3, 4),
    ),
    "indexed": RuleCase(body=lambda m, x: x + m.table[torch.arange(x.shape[1]) // 2], parts=lambda: {"table": weight(4, 4)}),
    "index_select": RuleCase(
        body=lambda m, x: x + m.table.index_select(0, torch.arange(x.shape[1]) % 3), parts=lambda: {"table": weight(3, 4)}
    ),
    "indexed by sample": RuleCase(
        body=lambda m, x: x + m.table[x[:, 0, 0].gt(0).long()][:, None],
        parts=lambda: {"table": weight(2, 4)},
        by_row=("table",),
    ),
    "rows and columns": RuleCase(
        body=lambda m, x: x + (m.rows[:, None] + m.columns[None]).flatten(0, 1),
        parts=lambda: {"rows": weight(2, 4), "columns": weight(3, 4)},
        shape=(6, 4),
    ),
    "interpolated": RuleCase(
        body=lambda m, x: (
            x + F.interpolate(m.grid.reshape(1, 2, 2, 4).permute(0, 3, 1, 2), (3, 3), mode="bicubic").flatten(2).mT
        ),
        parts=lambda: {"grid": weight(1, 4, 4)},
        shape=(9, 4),
    ),
    "padded": RuleCase(
        body=lambda m, x: x + F.pad(m.positions, (0, 0, 0, x.shape[1] - 4)), parts=lambda: {"positions": weight(4, 4)}
    ),
    "angles": RuleCase(
        body=lambda m, x: x * torch.cos(torch.outer(torch.arange(x.shape[1], dtype=x.dtype), m.frequencies)),
        parts=lambda: {"frequencies": weight(4)},
    ),
}


NAMED = {f"token {name}": case for name, case in TOKENS.items()} | {
    f"positions {name}": case for name, case in POSITIONS.items()
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", NAMED)
def test_tokens_and_positions(name: str, stem: bool):
    NAMED[name].assert_exact(stem=stem)


@pytest.mark.parametrize("name", ["expanded with -1", "repeated", "stacked", "initial state of a recurrence"])
def test_rows_alone_in_their_microbatch(name: str):
    TOKENS[name].assert_exact(sizes=(1, 1, 1))
