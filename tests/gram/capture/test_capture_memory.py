"""What a capture keeps in memory, and for how long."""

import weakref

import torch
from torch import Tensor, nn

from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.capture.interception import Capture


def test_inputs_are_let_go_on_the_way_back():
    """As in a plain pass: otherwise all inputs stay in memory until the whole backward pass is over."""
    draw = torch.Generator().manual_seed(0)
    parameters = {name: torch.randn(4, 4, generator=draw) for name in ("first", "second")}
    inputs = torch.randn(3, 4, generator=draw)
    held: dict[str, weakref.ref[Tensor]] = {}
    alive: list[str] = []

    def completed(name: str, found: list[Placed]) -> None:
        alive.extend(earlier for earlier, reference in held.items() if reference() is not None)
        held[name] = weakref.ref(found[0].use.tensors()[0])

    capture = Capture(parameters, 3, unruled={})
    with capture:
        hidden = torch.tanh(nn.functional.linear(inputs, parameters["first"]))
        loss = nn.functional.linear(hidden, parameters["second"]).square().sum()
    capture.backward(loss, completed, again=True)
    assert alive == ["second"]  # which the next backward pass needs
    held.clear()
    alive.clear()
    capture.backward(loss, completed, again=False)
    assert list(held) == ["second", "first"]
    assert not alive
