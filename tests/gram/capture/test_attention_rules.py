"""Attention with parameters in its scores, masks, queries and sinks, and torch's own attention layers, against the loop."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gram.capture.rule_cases import Parts, RuleCase, T, weight

WIDTH = (T, 4)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 2)).transpose(1, 2)  # (N, heads, T, 2)


def projections() -> Parts:
    return {"query": nn.Linear(4, 4), "key": nn.Linear(4, 4), "value": nn.Linear(4, 4)}


def self_attention(m: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Scores written out; `bias` is added to them."""
    scores = split(m.query(x)) @ split(m.key(x)).mT / math.sqrt(2)
    return torch.softmax(scores if bias is None else scores + bias, -1) @ split(m.value(x))


def masked_attention(m: Any, x: Tensor, bias: Tensor) -> Tensor:
    """The same by torch's kernel; `bias` is its mask."""
    return F.scaled_dot_product_attention(split(m.query(x)), split(m.key(x)), split(m.value(x)), attn_mask=bias)


def relative_index(length: int) -> Tensor:
    position = torch.arange(length)
    return (position[:, None] - position[None]).clamp(-3, 3) + 3  # (T, T) in 0..6


def table_bias(m: Any, length: int) -> Tensor:
    """Swin: the table indexed by a flat buffer, (1, heads, T, T)."""
    index = relative_index(length)
    return m.table[index.view(-1)].view(length, length, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def looked_up_bias(m: Any, length: int) -> Tensor:
    """T5: an embedding of an index without sample axis."""
    return m.table(relative_index(length)).permute([2, 0, 1]).unsqueeze(0)


def swin(m: Any, x: Tensor) -> Tensor:
    """Two windows for each sample on axis 0."""
    windows = x.unflatten(1, (2, 3)).flatten(0, 1)  # (N windows, 3, 4)
    mixed = masked_attention(m, windows, table_bias(m, 3)).transpose(1, 2).flatten(2)
    return mixed.reshape(len(x), -1, 4)


def shifted_swin(m: Any, x: Tensor) -> Tensor:
    """With the mask of a shifted window, which repeats along windows."""
    windows = x.unflatten(1, (2, 3)).flatten(0, 1)
    mask = torch.zeros(2, 3, 3, dtype=x.dtype)
    mask[1, 0, 1:] = mask[1, 1:, 0] = -3.0
    bias = table_bias(m, 3) + mask.repeat(len(x), 1, 1).unsqueeze(1)  # (N windows, heads, 3, 3)
    return masked_attention(m, windows, bias).transpose(1, 2).flatten(2).reshape(len(x), -1, 4)


def sinks(m: Any, x: Tensor) -> Tensor:
    """GPT-OSS: one more column of scores, dropped after the softmax."""
    scores = split(m.query(x)) @ split(m.key(x)).mT
    column = m.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[-2], -1)
    combined = torch.cat([scores, column], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1] @ split(m.value(x))


def disentangled(m: Any, x: Tensor) -> Tensor:
    """DeBERTa: relative embeddings pass a norm and the very projections of the activations."""
    relative = m.norm(m.relative.weight)  # (7, 4)
    query, key = split(m.query(x)), split(m.key(x))
    position_key, position_query = split(m.key(relative[None])), split(m.query(relative.unsqueeze(0)))
    index = relative_index(x.shape[1]).expand(len(x), 2, -1, -1)
    content_to_position = torch.gather(query @ position_key.mT, -1, index)
    position_to_content = torch.gather(key @ position_query.mT, -1, index).mT
    return torch.softmax(query @ key.mT + content_to_position + position_to_content, -1) @ split(m.value(x))


def recurrent_positions(m: Any, x: Tensor) -> Tensor:
    """Transformer-XL: two biases of the query, one for content and one for (projected) positions."""
    query, positions = split(m.query(x)), split(m.position(m.table[:, : x.shape[1]]))
    scores = (query + m.u[:, None]) @ split(m.key(x)).mT + (query + m.v[:, None]) @ positions.mT
    return torch.softmax(scores, -1) @ split(m.value(x))


def pooled(m: Any, x: Tensor) -> Tensor:
    """Perceiver, Q-Former: learned queries attend to the inputs."""
    latents = m.latents.expand(len(x), -1, -1)
    latents = latents + F.scaled_dot_product_attention(m.query(latents), m.key(x), m.value(x))
    return m.output(latents)


def cross() -> Parts:
    return projections() | {"latents": weight(1, 3, 4), "output": nn.Linear(4, 2)}


SCORES = {
    "learned queries by SDPA": RuleCase(body=pooled, parts=cross),
    "learned queries by SDPA, as many as rows": RuleCase(
        body=lambda m, x: F.scaled_dot_product_attention(m.latents.expand(len(x), 3, 4), x, x),
        parts=lambda: {"latents": weight(3, 4)},
    ),
    "learned queries by matmul": RuleCase(
        body=lambda m, x: torch.softmax(m.latents @ x.mT, -1) @ x, parts=lambda: {"latents": weight(3, 4)}
    ),
    "learned queries by einsum": RuleCase(
        body=lambda m, x: torch.softmax(torch.einsum("qd,ntd->nqt", m.latents, x), -1) @ x,
        parts=lambda: {"latents": weight(3, 4)},
    ),
    "learned queries through a layer": RuleCase(
        body=lambda m, x: torch.softmax(m.query(m.latents) @ m.key(x).mT, -1) @ m.value(x),
        parts=lambda: projections() | {"latents": weight(3, 4)},
    ),
    "attention pooling by one vector": RuleCase(
        body=lambda m, x: torch.softmax(x @ m.vector, -1).unsqueeze(1) @ x, parts=lambda: {"vector": weight(4)}
    ),
    "learned memory": RuleCase(
        body=lambda m, x: F.scaled_dot_product_attention(
            m.query(x), torch.cat([m.keys.expand(len(x), -1, -1), x], 1), torch.cat([m.values.expand(len(x), -1, -1), x], 1)
        ),
        parts=lambda: {"query": nn.Linear(4, 4), "keys": weight(1, 2, 4), "values": weight(1, 2, 4)},
    ),
    "relative table added": RuleCase(
        body=lambda m, x: self_attention(m, x, table_bias(m, x.shape[1])), parts=lambda: projections() | {"table": weight(7, 2)}
    ),
    "relative table as a mask": RuleCase(
        body=lambda m, x: masked_attention(m, x, table_bias(m, x.shape[1])),
        parts=lambda: projections() | {"table": weight(7, 2)},
    ),
    "relative table as an expanded mask": RuleCase(
        body=lambda m, x: masked_attention(m, x, table_bias(m, x.shape[1]).expand(len(x), -1, -1, -1)),
        parts=lambda: projections() | {"table": weight(7, 2)},
    ),
    "relative table as a causal mask": RuleCase(
        body=lambda m, x: masked_attention(
            m, x, table_bias(m, x.shape[1]) + torch.full((x.shape[1],) * 2, -9.0, dtype=x.dtype).triu(1)
        ),
        parts=lambda: projections() | {"table": weight(7, 2)},
    ),
    "relative embedding added": RuleCase(
        body=lambda m, x: self_attention(m, x, looked_up_bias(m, x.shape[1])),
        parts=lambda: projections() | {"table": nn.Embedding(7, 2)},
    ),
    "relative embedding, as many positions as rows": RuleCase(
        body=lambda m, x: self_attention(m, x, looked_up_bias(m, 3)),
        parts=lambda: projections() | {"table": nn.Embedding(7, 2)},
        shape=(3, 4),
    ),
    "relative embedding shared by two layers": RuleCase(
        body=lambda m, x: self_attention(
            m, self_attention(m, x, looked_up_bias(m, x.shape[1])).transpose(1, 2).flatten(2), looked_up_bias(m, x.shape[1])
        ),
        parts=lambda: projections() | {"table": nn.Embedding(7, 2)},
    ),
    "log-spaced bias of a small network": RuleCase(
        body=lambda m, x: self_attention(
            m,
            x,
            16
            * torch.sigmoid(m.network(torch.linspace(-1, 1, 7, dtype=x.dtype)[:, None])[relative_index(x.shape[1])]).permute(
                2, 0, 1
            ),
        ),
        parts=lambda: projections() | {"network": nn.Sequential(nn.Linear(1, 5), nn.GELU(), nn.Linear(5, 2, bias=False))},
    ),
    "windows": RuleCase(body=swin, parts=lambda: projections() | {"table": weight(7, 2)}, shape=(6, 4)),
    "shifted windows": RuleCase(body=shifted_swin, parts=lambda: projections() | {"table": weight(7, 2)}, shape=(6, 4)),
    "sinks": RuleCase(body=sinks, parts=lambda: projections() | {"sinks": weight(2)}),
    "temperature of each head": RuleCase(
        body=lambda m, x: torch.softmax(
            F.normalize(split(x), dim=-1) @ F.normalize(split(x), dim=-1).mT * m.scale.clamp(max=4.6).exp(), -1
        ),
        parts=lambda: {"scale": weight(2, 1, 1)},
    ),
    "disentangled": RuleCase(
        body=disentangled, parts=lambda: projections() | {"relative": nn.Embedding(7, 4), "norm": nn.LayerNorm(4)}
    ),
    "content and position biases": RuleCase(
        body=recurrent_positions,
        parts=lambda: (
            projections() | {"u": weight(2, 2), "v": weight(2, 2), "position": nn.Linear(4, 4), "table": weight(1, 7, 4)}
        ),
    ),
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", SCORES)
def test_parameters_in_attention(name: str, stem: bool):
    SCORES[name].assert_exact(stem=stem)


def attend(m: Any, x: Tensor, **options: Any) -> Tensor:
    return m.layer(x, x, x, need_weights=False, **options)[0]


def crossed(m: Any, x: Tensor) -> Tensor:
    return m.layer(x, torch.sin(x)[:, :3, :3], torch.cos(x)[:, :3, :2])[0]


def sequence_first(m: Any, x: Tensor) -> Tensor:
    return attend(m, x.transpose(0, 1)).transpose(0, 1)


def padded(m: Any, x: Tensor) -> Tensor:
    return attend(m, x, key_padding_mask=torch.arange(x.shape[1]).expand(len(x), -1) > 2)


def encoder(batch_first: bool, norm_first: bool = False) -> Parts:
    layer = nn.TransformerEncoderLayer(4, 2, 5, 0.0, "gelu", batch_first=batch_first, norm_first=norm_first)
    return {"layer": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)}


def attention(**options: Any) -> Parts:
    return {"layer": nn.MultiheadAttention(4, 2, **options)}


KEY_VALUE = ("layer.bias_k", "layer.bias_v")

LAYERS = {
    "multihead": RuleCase(body=attend, parts=lambda: attention(batch_first=True)),
    "multihead without bias": RuleCase(body=attend, parts=lambda: attention(batch_first=True, bias=False)),
    "multihead with weights": RuleCase(body=lambda m, x: m.layer(x, x, x)[0], parts=lambda: attention(batch_first=True)),
    "multihead, padded": RuleCase(body=padded, parts=lambda: attention(batch_first=True)),
    "multihead, key and value apart": RuleCase(body=crossed, parts=lambda: attention(batch_first=True, kdim=3, vdim=2)),
    "multihead, bias_kv": RuleCase(body=attend, parts=lambda: attention(batch_first=True, add_bias_kv=True), by_row=KEY_VALUE),
    "multihead, zero_attn": RuleCase(body=attend, parts=lambda: attention(batch_first=True, add_zero_attn=True)),
    "multihead, packed cross attention": RuleCase(
        body=lambda m, x: m.layer(x[:, :2], x, x)[0], parts=lambda: attention(batch_first=True)
    ),
    "multihead, positions first": RuleCase(body=sequence_first, parts=lambda: attention(batch_first=False)),
    "multihead, positions first, bias_kv": RuleCase(
        body=sequence_first, parts=lambda: attention(batch_first=False, add_bias_kv=True), by_row=KEY_VALUE
    ),
    "multihead, positions first, as many as rows": RuleCase(
        body=sequence_first, parts=lambda: attention(batch_first=False), shape=(3, 4)
    ),
    "encoder": RuleCase(body=lambda m, x: m.layer(x), parts=lambda: encoder(True)),
    "encoder, norm first": RuleCase(body=lambda m, x: m.layer(x), parts=lambda: encoder(True, True)),
    "encoder, positions first": RuleCase(
        body=lambda m, x: m.layer(x.mT.permute(2, 0, 1)).transpose(0, 1), parts=lambda: encoder(False)
    ),
    "decoder": RuleCase(
        body=lambda m, x: m.layer(x, torch.sin(x)),
        parts=lambda: {"layer": nn.TransformerDecoderLayer(4, 2, 5, 0.0, "gelu", batch_first=True)},
    ),
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", LAYERS)
def test_attention_layers_of_torch(name: str, stem: bool):
    LAYERS[name].assert_exact(stem=stem)


RECURRENT = {
    "rnn": RuleCase(body=lambda m, x: m.layer(x)[0], parts=lambda: {"layer": nn.RNN(4, 3, batch_first=True)}, by_row=...),
    "lstm": RuleCase(body=lambda m, x: m.layer(x)[0], parts=lambda: {"layer": nn.LSTM(4, 3, batch_first=True)}, by_row=...),
    "lstm, two ways": RuleCase(
        body=lambda m, x: m.layer(x)[0],
        parts=lambda: {"layer": nn.LSTM(4, 2, 2, batch_first=True, bidirectional=True, proj_size=1)},
        by_row=...,
    ),
    "gru, positions first": RuleCase(
        body=lambda m, x: m.layer(x.transpose(0, 1))[0].transpose(0, 1), parts=lambda: {"layer": nn.GRU(4, 3)}, by_row=...
    ),
    "lstm cell": RuleCase(body=lambda m, x: unrolled(m, x, 2), parts=lambda: {"cell": nn.LSTMCell(4, 3)}, by_row=...),
    "gru cell": RuleCase(body=lambda m, x: unrolled(m, x, 1), parts=lambda: {"cell": nn.GRUCell(4, 3)}, by_row=...),
}


def unrolled(m: Any, x: Tensor, states: int) -> Tensor:
    state: Any = None
    for t in range(x.shape[1]):
        state = m.cell(x[:, t], state)
    return state[0] if states == 2 else state


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_never_wrong(name: str, stem: bool):
    RECURRENT[name].assert_exact(stem=stem)
