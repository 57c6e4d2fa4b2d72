"""Tensors in place of parameters and buffers that a model knows by several names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks.model.substitution import substituted


class Twice(nn.Module):
    """A part of a network registered again, as N-BEATS has its backbone, and a weight tied to another module's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))
        self.backbone = self.net[:2]
        self.tied = nn.Linear(6, 8, bias=False)
        self.tied.weight = self.net[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.net[2](self.backbone(x)))


class Wrapped(nn.Module):
    """A module under two names, as Fabric's wrapper has it, that also knows itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = Twice()
        self.second.knows = nn.ModuleList([self.first.net])


def entries(model: nn.Module) -> list[tuple[int, str, int]]:
    """Every entry of every module, in order, by identity."""
    registries = [registry for module in model.modules() for registry in (module._parameters, module._buffers)]
    return [(id(registry), name, id(value)) for registry in registries for name, value in registry.items()]


@pytest.mark.parametrize("build", [Twice, Wrapped])
@pytest.mark.parametrize("fails", [False, True])
def test_every_entry_is_substituted_and_put_back(build: Callable[[], nn.Module], fails: bool) -> None:
    model = build()
    tensors = {name: torch.zeros_like(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    before = entries(model)
    for _ in range(2):
        try:
            with substituted(model, tensors):
                inside = {id(value) for name, value in model.named_parameters(remove_duplicate=False)}
                assert inside == {id(tensors[name]) for name, _ in model.named_parameters()}
                assert {id(value) for value in model.buffers()} <= {id(value) for value in tensors.values()}
                if fails:
                    raise ArithmeticError
        except ArithmeticError:
            assert fails
        assert entries(model) == before


def test_what_a_forward_pass_writes_into_a_registry_does_not_stay() -> None:
    model = nn.Linear(2, 2)
    before = entries(model)
    with substituted(model, {"weight": torch.zeros(2, 2)}):
        model._parameters["weight"] = torch.ones(2, 2)  # type: ignore[assignment]
    assert entries(model) == before
