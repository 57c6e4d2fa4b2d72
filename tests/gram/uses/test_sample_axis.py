"""Shapes that deceive about which axis holds the samples, and samples that are no samples: exact or refused, never wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.errors import RefusedError
from tests.gram.capture.rule_cases import Parts, RuleCase, parameter_grams, weight


def positions_first(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.inner(x.transpose(0, 1))).mean(0)


def interleaved(m: Any, x: Tensor) -> Tensor:
    """(T N, d): axis 0 is a multiple of N, but a sample's positions are not together."""
    return m.inner(x.transpose(0, 1).flatten(0, 1)).reshape(x.shape[1], len(x), -1).transpose(0, 1)


def linear() -> Parts:
    return {"inner": nn.Linear(4, 3)}


def chosen(m: Any, x: Tensor) -> Tensor:
    """Rows take one of two layers; the others' output stays zero."""
    left = x[:, 0, 0] > 0
    output = torch.zeros(*x.shape[:-1], 3, dtype=x.dtype)
    output = output.index_put((left.nonzero()[:, 0],), m.inner(x[left]))
    return output.index_put(((~left).nonzero()[:, 0],), m.other(x[~left]))


def written(m: Any, x: Tensor) -> Tensor:
    output = torch.zeros(*x.shape[:-1], 3, dtype=x.dtype)
    output[:, 1:] = m.inner(x[:, 1:])
    return torch.tanh(output) * m.scale


def copied(m: Any, x: Tensor) -> Tensor:
    output = torch.zeros(*x.shape[:-1], 3, dtype=x.dtype)
    output[:, 1:].copy_(m.inner(x[:, 1:]))
    return torch.tanh(output) * m.scale


def overwritten(m: Any, x: Tensor) -> Tensor:
    output = m.token.repeat(len(x), x.shape[1], 1)
    output[:, 1:] = m.inner(x[:, 1:])
    return output


def accumulated(m: Any, x: Tensor) -> Tensor:
    total = x * m.scale
    for _ in range(2):
        total += m.shift * torch.tanh(total)
        total *= m.scale
    return total


def resorted(m: Any, x: Tensor) -> Tensor:
    """As recurrent layers want their rows; the order differs from microbatch to microbatch."""
    order = x[:, 0, 0].argsort()
    return m.inner(x[order])[order.argsort()]


def packed(m: Any, x: Tensor) -> Tensor:
    """Valid positions only, (positions of all rows, d), scattered back."""
    valid = x[..., 0] > -0.5
    output = torch.zeros(*x.shape[:-1], 3, dtype=x.dtype)
    return output.masked_scatter(valid[..., None], m.inner(x[valid]))


ANY_PATH: dict[str, RuleCase] = {
    "positions first": RuleCase(body=positions_first, parts=linear, by_row=...),
    "positions first, as many as rows": RuleCase(body=positions_first, parts=linear, shape=(3, 4), by_row=...),
    "positions first, twice as many": RuleCase(body=positions_first, parts=linear, shape=(6, 4), by_row=...),
    "interleaved": RuleCase(body=interleaved, parts=linear, shape=(6, 4), by_row=...),
    "features first": RuleCase(
        body=lambda m, x: (m.weight @ x.T).T, parts=lambda: {"weight": weight(3, 6)}, shape=(6,), by_row=...
    ),
    "features first, as many as rows": RuleCase(
        body=lambda m, x: (m.weight @ x.T).T, parts=lambda: {"weight": weight(3, 3)}, shape=(3,), by_row=...
    ),
    "samples in the middle": RuleCase(
        body=lambda m, x: torch.einsum("tnd,de->tne", x.transpose(0, 1), m.weight).transpose(0, 1),
        parts=lambda: {"weight": weight(4, 3)},
        shape=(6, 4),
        by_row=...,
    ),
    "heads first": RuleCase(
        body=lambda m, x: torch.bmm(x.transpose(0, 1), m.weight).transpose(0, 1),
        parts=lambda: {"weight": weight(6, 4, 3)},
        shape=(6, 4),
        by_row=...,
    ),
    "scale of positions first": RuleCase(
        body=lambda m, x: (x.transpose(0, 1) * m.scale + m.shift).transpose(0, 1),
        parts=lambda: {"scale": weight(4), "shift": weight(6, 1, 4)},
        shape=(6, 4),
        by_row=...,
    ),
    "backwards": RuleCase(body=lambda m, x: m.inner(x.flip(0)).flip(0), parts=linear, by_row=...),
    "one row after another": RuleCase(body=lambda m, x: torch.stack([m.inner(row) for row in x]), parts=linear, by_row=...),
    "one row after another, square": RuleCase(
        body=lambda m, x: torch.stack([m.inner(row) for row in x]), parts=linear, shape=(3, 4), by_row=...
    ),
    "only some rows": RuleCase(
        body=lambda m, x: chosen(m, x), parts=lambda: linear() | {"other": nn.Linear(4, 3)}, by_row=..., dead=...
    ),
    "positions packed without padding": RuleCase(body=lambda m, x: packed(m, x), parts=linear, by_row=...),
    "rows doubled": RuleCase(
        body=lambda m, x: m.inner(torch.cat([x, torch.sin(x)])).reshape(2, len(x), -1).transpose(0, 1), parts=linear, by_row=...
    ),
    "rows doubled by interleaving": RuleCase(
        body=lambda m, x: m.inner(x.repeat_interleave(2, 0) * 0.5).reshape(len(x), -1), parts=linear, by_row=...
    ),
    "written into zeros": RuleCase(body=written, parts=lambda: linear() | {"scale": weight(3)}, by_row=...),
    "copied into a slice of zeros": RuleCase(body=copied, parts=lambda: linear() | {"scale": weight(3)}, by_row=...),
    "written into copies of a parameter": RuleCase(
        body=overwritten, parts=lambda: linear() | {"token": weight(1, 1, 3)}, by_row=...
    ),
    "accumulated in place": RuleCase(body=accumulated, parts=lambda: {"scale": weight(4), "shift": weight(4)}, by_row=...),
    "gathered by samples and positions": RuleCase(
        body=lambda m, x: m.inner(x[torch.arange(len(x))[:, None], x[..., 0].argsort(1)]), parts=linear, by_row=...
    ),
    "sorted by length and back": RuleCase(body=resorted, parts=linear, by_row=...),
    "a row for each pair": RuleCase(
        body=lambda m, x: (torch.tanh(m.inner(x))[:, :, None] * m.inner(x)[:, None]).flatten(1, 2) * m.scale,
        parts=lambda: linear() | {"scale": weight(3)},
        by_row=...,
    ),
    "vmap": RuleCase(body=lambda m, x: torch.vmap(m.inner)(x), parts=linear, by_row=...),
}


@pytest.mark.parametrize("sizes", [(3, 1, 2), (3,), (2, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ANY_PATH)
def test_whichever_path_it_takes_the_gram_is_exact(name: str, sizes: tuple[int, ...]):
    ANY_PATH[name].assert_exact(stem=True, sizes=sizes)


WITH_RULES = {
    "as many positions as rows": RuleCase(body=lambda m, x: m.inner(x), parts=linear, shape=(3, 4)),
    "twice as many positions": RuleCase(body=lambda m, x: m.inner(x), parts=linear, shape=(6, 4)),
    "one position": RuleCase(body=lambda m, x: m.inner(x), parts=linear, shape=(1, 4)),
    "as many features as rows": RuleCase(
        body=lambda m, x: m.inner(x) * m.scale, parts=lambda: {"inner": nn.Linear(3, 3), "scale": weight(3)}, shape=(3,)
    ),
    "a scale of as many positions as rows": RuleCase(
        body=lambda m, x: x * m.scale + m.shift, parts=lambda: {"scale": weight(3, 1), "shift": weight(3, 4)}, shape=(3, 4)
    ),
    "a scale of as many channels as rows": RuleCase(
        body=lambda m, x: x * m.scale, parts=lambda: {"scale": weight(3, 1, 1)}, shape=(3, 2, 4)
    ),
    "position ids with sample axis 1": RuleCase(
        body=lambda m, x: x + m.table(torch.arange(3)[None]), parts=lambda: {"table": nn.Embedding(4, 4)}, shape=(3, 4)
    ),
    "position ids without sample axis": RuleCase(
        body=lambda m, x: x + m.table(torch.arange(6)), parts=lambda: {"table": nn.Embedding(7, 4)}, shape=(6, 4)
    ),
}


@pytest.mark.parametrize("sizes", [(3, 1, 2), (3,), (6, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", WITH_RULES)
def test_coinciding_extents_need_no_fallback(name: str, sizes: tuple[int, ...]):
    WITH_RULES[name].assert_exact(stem=True, sizes=sizes)


def by_row(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    """Every row against all others, one loss a row."""
    hidden = F.normalize(model(batch[0]), dim=-1)
    return F.cross_entropy(hidden @ hidden.T, torch.arange(len(hidden)), reduction="none")


# Coupled through constants, activations before, after and between the parameters.
COUPLED = {
    "inputs minus their mean": RuleCase(body=lambda m, x: m.inner(x - x.mean(0)), parts=linear),
    "activations minus their mean": RuleCase(body=lambda m, x: centred(torch.tanh(m.inner(x))), parts=linear),
    "their mean between two layers": RuleCase(
        body=lambda m, x: m.outer(centred(torch.tanh(m.inner(x)))), parts=lambda: linear() | {"outer": nn.Linear(3, 3)}
    ),
    "a mean without gradient": RuleCase(body=lambda m, x: m.inner(x) - m.inner(x).detach().mean(0), parts=linear),
    "attention across rows": RuleCase(
        body=lambda m, x: torch.softmax(m.inner(x[:, 0]) @ m.inner(x[:, 0]).T, -1) @ x[:, 0], parts=linear
    ),
    "rows shifted by one": RuleCase(body=lambda m, x: m.inner(x) + x.roll(1, 0)[..., :3], parts=linear),
    "a scale of the batch's size": RuleCase(body=lambda m, x: m.inner(x) * len(x), parts=linear),
}


def centred(hidden: Tensor) -> Tensor:
    return hidden - hidden.mean(0)


@pytest.mark.parametrize("loss", ["cross_entropy", by_row])
@pytest.mark.parametrize("name", COUPLED)
def test_rows_that_are_coupled_are_refused(name: str, loss: Any):
    case = COUPLED[name]
    with pytest.raises(RefusedError):
        parameter_grams(case.model(), case.microbatches((3, 4)), loss)


def test_a_loss_across_rows_is_refused():
    case = RuleCase(body=lambda m, x: m.inner(x), parts=linear)
    with pytest.raises(RefusedError):
        parameter_grams(case.model(), case.microbatches((3, 4)), contrastive)
