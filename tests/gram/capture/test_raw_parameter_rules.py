"""Parameters that belong to no layer (scales, gates, temperatures) against the loop over rows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gram.capture.rule_cases import RuleCase, T, assert_ruled, weight

SCALES = {
    "layer scale": RuleCase(body=lambda m, x: x + m.gamma * torch.sin(x), parts=lambda: {"gamma": weight(4)}),
    "layer scale after": RuleCase(body=lambda m, x: x + torch.sin(x) * m.gamma, parts=lambda: {"gamma": weight(1, 1, 4)}),
    "layer scale in place": RuleCase(
        body=lambda m, x: x + torch.sin(x).mul_(m.gamma), parts=lambda: {"gamma": weight(4)}, by_row=("gamma",)
    ),
    "of channels": RuleCase(body=lambda m, x: m.gamma * x, parts=lambda: {"gamma": weight(3, 1, 1)}, shape=(3, 2, 4)),
    "viewed as channels": RuleCase(
        body=lambda m, x: x * m.gamma.view(1, -1, 1, 1), parts=lambda: {"gamma": weight(3)}, shape=(3, 2, 4)
    ),
    "indexed as channels": RuleCase(
        body=lambda m, x: x * m.gamma[:, None, None], parts=lambda: {"gamma": weight(3)}, shape=(3, 2, 4)
    ),
    "scalar": RuleCase(body=lambda m, x: x + m.alpha * torch.sin(x), parts=lambda: {"alpha": weight()}),
    "scalar of one entry": RuleCase(body=lambda m, x: x + torch.sin(x) * m.alpha, parts=lambda: {"alpha": weight(1)}),
    "temperature": RuleCase(body=lambda m, x: F.normalize(x, dim=-1) * m.scale.exp(), parts=lambda: {"scale": weight()}),
    "temperature, clamped": RuleCase(
        body=lambda m, x: torch.clamp(m.scale, max=9.0).exp() * x, parts=lambda: {"scale": weight()}
    ),
    "divided": RuleCase(body=lambda m, x: x / m.scale, parts=lambda: {"scale": nn.Parameter(torch.full((4,), 2.0))}),
    "divides": RuleCase(body=lambda m, x: m.scale / (2 + torch.sin(x)), parts=lambda: {"scale": weight(4)}),
    "subtracted": RuleCase(body=lambda m, x: x - m.mean, parts=lambda: {"mean": weight(4)}),
    "subtracted from": RuleCase(body=lambda m, x: m.mean - x, parts=lambda: {"mean": weight(4)}),
    "power": RuleCase(body=lambda m, x: (1.5 + torch.sin(x)) ** m.power, parts=lambda: {"power": weight(4)}),
    "gate": RuleCase(body=lambda m, x: x * torch.sigmoid(m.gate), parts=lambda: {"gate": weight(4)}),
    "gate and its complement": RuleCase(
        body=lambda m, x: m.gate.sigmoid() * x + (1 - m.gate.sigmoid()) * torch.sin(x), parts=lambda: {"gate": weight(4)}
    ),
    "lerp": RuleCase(body=lambda m, x: torch.lerp(x, torch.sin(x), torch.sigmoid(m.gate)), parts=lambda: {"gate": weight(4)}),
    "token shift": RuleCase(
        body=lambda m, x: x * m.mix + F.pad(x, (0, 0, 1, -1)) * (1 - m.mix), parts=lambda: {"mix": weight(1, 1, 4)}
    ),
    "softplus of a bias": RuleCase(body=lambda m, x: F.softplus(x + m.bias), parts=lambda: {"bias": weight(4)}),
    "softplus before": RuleCase(body=lambda m, x: x * F.softplus(m.rate), parts=lambda: {"rate": weight(4)}),
    "negated": RuleCase(body=lambda m, x: x * -m.rate, parts=lambda: {"rate": weight(4)}),
    "mixture of terms": RuleCase(
        body=lambda m, x: sum(w * x**k for k, w in enumerate(torch.softmax(m.mix, 0), 1)), parts=lambda: {"mix": weight(3)}
    ),
    "addcmul": RuleCase(
        body=lambda m, x: torch.addcmul(m.shift, x, m.scale), parts=lambda: {"shift": weight(4), "scale": weight(4)}
    ),
    "maximum": RuleCase(body=lambda m, x: torch.maximum(x, m.floor), parts=lambda: {"floor": weight(4)}),
    "add with alpha": RuleCase(body=lambda m, x: torch.add(x, m.shift, alpha=-2), parts=lambda: {"shift": weight(4)}),
    "prelu": RuleCase(body=lambda m, x: m.act(x), parts=lambda: {"act": nn.PReLU()}),
    "prelu of channels": RuleCase(body=lambda m, x: F.prelu(x, m.slope), parts=lambda: {"slope": weight(3)}, shape=(3, 4)),
    "the product of two": RuleCase(
        body=lambda m, x: x * (m.gain * m.scale), parts=lambda: {"gain": weight(), "scale": weight(4)}
    ),
    "the sum of two": RuleCase(
        body=lambda m, x: x + (m.first + m.second), parts=lambda: {"first": weight(4), "second": weight(1, 4)}
    ),
    "its own square": RuleCase(body=lambda m, x: x * m.scale * m.scale, parts=lambda: {"scale": weight(4)}),
    "a square before": RuleCase(body=lambda m, x: x * (m.scale * m.scale), parts=lambda: {"scale": weight(4)}),
    "scale and shift in one": RuleCase(
        body=lambda m, x: x * m.both.chunk(2)[0] + m.both.chunk(2)[1], parts=lambda: {"both": weight(8)}
    ),
    "unbound": RuleCase(body=lambda m, x: x * m.both.unbind()[0] + m.both.unbind(0)[1], parts=lambda: {"both": weight(2, 4)}),
    "split": RuleCase(
        body=lambda m, x: x * torch.split(m.both, [4, 1])[0] + torch.split(m.both, [4, 1])[1], parts=lambda: {"both": weight(5)}
    ),
    "iterated": RuleCase(body=lambda m, x: sum(x * row for row in m.rows), parts=lambda: {"rows": weight(3, 4)}),
    "one entry at a time": RuleCase(
        body=lambda m, x: torch.stack([x[..., j] * m.scale[j] for j in range(4)], -1), parts=lambda: {"scale": weight(4)}
    ),
    "a list of parameters": RuleCase(
        body=lambda m, x: sum(x**k * p for k, p in enumerate(m.scales, 1)),
        parts=lambda: {"scales": nn.ParameterList([weight(4), weight(), weight(1, 4)])},
    ),
    "polynomial": RuleCase(body=lambda m, x: m.c[0] + m.c[1] * x + m.c[2] * x.square(), parts=lambda: {"c": weight(3)}),
    "spectral filter": RuleCase(
        body=lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=-1) * torch.view_as_complex(m.filter), n=4),
        parts=lambda: {"filter": weight(3, 2)},
        by_row=...,
    ),
}


def scan(m: Any, x: Tensor) -> Tensor:
    """Mamba's recurrence in a nutshell: a state (N, d, s) with decay `exp(dt A)`."""
    A = -torch.exp(m.A_log.float())
    dt = F.softplus(x + m.dt_bias).float()
    state, outputs = x.new_zeros(len(x), 4, 3, dtype=torch.float32), []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t].float())[..., None]
        outputs.append(state.sum(-1))
    return torch.stack(outputs, 1).to(x.dtype) + x * m.D


def heads(m: Any, x: Tensor) -> Tensor:
    """Mamba2: one decay for each head, broadcast with None indices."""
    decay = torch.exp(F.softplus(x.unflatten(-1, (2, 2)).mean(-1) + m.dt_bias) * -torch.exp(m.A_log))
    return x.unflatten(-1, (2, 2)) * decay[..., None] + x.unflatten(-1, (2, 2)) * m.D[..., None]


CONSTANTS = {
    "detached": RuleCase(body=lambda m, x: x * m.scale.detach() + x.sin() * m.scale, parts=lambda: {"scale": weight(4)}),
    "torch.detach": RuleCase(
        body=lambda m, x: x * torch.detach(m.scale) + x.sin() * m.scale, parts=lambda: {"scale": weight(4)}
    ),
    "data": RuleCase(body=lambda m, x: x * m.scale.data + x.sin() * m.scale, parts=lambda: {"scale": weight(4)}),
    "detached after a function": RuleCase(
        body=lambda m, x: x * m.scale.exp().detach() + x.sin() * m.scale.exp(), parts=lambda: {"scale": weight(4)}
    ),
    "without gradient": RuleCase(body=lambda m, x: normalised(m, x), parts=lambda: {"scale": weight(4)}),
    "straight through": RuleCase(
        body=lambda m, x: x * (m.scale + (torch.round(m.scale * 4) / 4 - m.scale).detach()), parts=lambda: {"scale": weight(4)}
    ),
    "as a number": RuleCase(body=lambda m, x: x * m.scale.item() + x.sin() * m.scale, parts=lambda: {"scale": weight()}),
    "only detached": RuleCase(
        body=lambda m, x: x * m.scale.detach() * m.gain, parts=lambda: {"scale": weight(4), "gain": weight()}, dead=("scale",)
    ),
    "only its shape": RuleCase(
        body=lambda m, x: x[..., : m.scale.shape[0]] * m.gain * len(m.scale),
        parts=lambda: {"scale": weight(4), "gain": weight()},
        dead=("scale",),
    ),
    "threshold": RuleCase(
        body=lambda m, x: x * (x > m.level) * m.gain,
        parts=lambda: {"level": weight(4), "gain": weight()},
        dead=("level",),
        by_row=("level",),
    ),
    "zeros like it": RuleCase(
        body=lambda m, x: x * (torch.zeros_like(m.scale) + m.gain),
        parts=lambda: {"scale": weight(4), "gain": weight()},
        dead=("scale",),
        by_row=("scale",),
    ),
}


def normalised(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        norm = m.scale.norm()
    return x * m.scale / norm


def sometimes(m: Any, x: Tensor) -> Tensor:
    return x * m.scale if x.shape[1] > 4 else x.sin()


NAMED = SCALES | {f"constant: {name}": case for name, case in CONSTANTS.items()}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", NAMED)
def test_raw_parameters(name: str, stem: bool):
    NAMED[name].assert_exact(stem=stem)


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize(
    "case",
    [
        RuleCase(body=scan, parts=lambda: {"A_log": weight(4, 3), "dt_bias": weight(4), "D": weight(4)}),
        RuleCase(body=heads, parts=lambda: {"A_log": weight(2), "dt_bias": weight(2), "D": weight(2)}),
    ],
    ids=["mamba", "mamba2"],
)
def test_state_space_parameters(case: RuleCase, stem: bool):
    assert_ruled(case.model(stem=stem), case.microbatches(), tolerance=1e-5)


def test_a_parameter_only_some_microbatches_use():
    RuleCase(body=sometimes, parts=lambda: {"scale": weight(4)}).assert_exact(stem=True)


def test_channels_of_ragged_clips():
    """A position axis that is not the second one."""
    RuleCase(
        body=lambda m, x: m.scale * x + m.shift,
        parts=lambda: {"scale": weight(3, 1, 1), "shift": weight(1, 1, 2)},
        shape=(3, T, 2),
    ).assert_exact()
