"""What an intercepted operation meets besides its rule: other overloads, rules with a bug, a torch that cannot be opened."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.gram.capture import interception, rules
from curvature_callbacks.gram.capture.arguments import opened_attention
from curvature_callbacks.gram.capture.rules import RULES, rule_for
from curvature_callbacks.library_internals.tensors import without_dispatch
from tests.gram.capture.rule_cases import RuleCase, T, weight

LINEAR = RuleCase(body=lambda m, x: F.linear(x, m.weight), parts=lambda: {"weight": weight(3, 4)}, shape=(4,))
ATTENTION = RuleCase(
    body=lambda m, x: m.layer(x, x, x, need_weights=False)[0],
    parts=lambda: {"layer": nn.MultiheadAttention(4, 2, batch_first=True)},
    shape=(T, 4),
    dead=...,
)


def test_a_rule_is_for_the_arguments_of_its_signature():
    x, W = torch.ones(2, 3), torch.ones(3, 3)
    assert rule_for(torch.mm, (x, W), {}) is RULES[torch.mm]
    assert rule_for(torch.mm, (x,), {"other": W}) is RULES[torch.mm]
    assert rule_for(torch.mm, (x, W), {"out": x}) is None
    assert rule_for(torch.add, (x, 2, W), {}) is None
    assert rule_for(torch.sin, (x,), {}) is None


def test_an_error_of_a_rule_is_not_taken_for_another_overload(monkeypatch: pytest.MonkeyPatch):
    def faulty(layout_of: Any, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        raise TypeError("a bug of the rule")

    monkeypatch.setattr(rules, "RULES", {**RULES, F.linear: faulty})
    with pytest.raises(TypeError, match="a bug of the rule"):
        LINEAR.assert_exact()


def test_attention_that_cannot_be_opened_goes_row_by_row(monkeypatch: pytest.MonkeyPatch):
    ATTENTION.assert_exact()
    monkeypatch.setattr(interception, "opened_attention", lambda: None)
    with pytest.raises(AssertionError, match="no rule for `multi_head_attention_forward`"):
        ATTENTION.assert_exact()
    RuleCase(body=ATTENTION.body, parts=ATTENTION.parts, shape=ATTENTION.shape, by_row=..., dead=...).assert_exact()


def test_torchs_attention_is_opened_once_and_does_what_it_does():
    opened = opened_attention()
    assert opened is not None
    assert opened is opened_attention()
    layer, x = nn.MultiheadAttention(4, 2).double(), torch.randn(3, 2, 4, dtype=torch.float64)
    arguments = (x, x, x, 4, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0)
    arguments = (*arguments, layer.out_proj.weight, layer.out_proj.bias)
    assert torch.equal(opened(*arguments)[0], F.multi_head_attention_forward(*arguments)[0])


@pytest.mark.parametrize("function", [torch.relu, len, lambda x: x], ids=["built in", "of Python", "without the question"])
def test_functions_of_another_form_are_not_opened(function: Any):
    assert without_dispatch(function) is None
