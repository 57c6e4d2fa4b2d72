"""Whatever is written in place is seen and can be put back, whichever way it is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature_callbacks.isolation.writes import WriteWatch


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: x.data.add_(1),
        lambda x: x[1:].zero_(),
        lambda x: x.view(-1).detach()[0].fill_(7),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch._foreach_mul_([x], 2.0),
        lambda x: x.copy_(torch.ones(3)),
    ],
    ids=["in place", "data", "part", "view", "out", "many", "copy"],
)
def test_every_way_of_writing_is_seen_and_undone(write: Callable[[Tensor], Any]) -> None:
    value, other = torch.arange(3.0), torch.ones(3)
    with WriteWatch() as watch:
        made = torch.zeros(3)
        made.add_(1)
        write(value)
    assert watch.changed(value)
    assert not watch.changed(other)
    watch.put_back()
    assert value.tolist() == [0, 1, 2]
    value.mul_(3)
    watch.put_back()
    assert value.tolist() == [0, 1, 2]
    assert made.tolist() == [1, 1, 1]


def test_a_tensor_made_longer_has_its_length_again() -> None:
    value = torch.arange(3.0)
    with WriteWatch() as watch:
        value.detach().resize_(6).fill_(1)
    watch.put_back()
    assert value.untyped_storage().nbytes() == 12
    assert value.tolist() == [0, 1, 2]


def test_writing_the_same_changes_nothing() -> None:
    value = torch.arange(3.0)
    with WriteWatch() as watch:
        value.clamp_(0, 9)
    assert not watch.changed(value)
