"""What tests of blocks share."""

import re

from torch import nn

from curvature_callbacks.record import tag_segment

EARLY = {"early": ["transformer.wte", "transformer.wpe", "transformer.h.0"], "late": ["transformer.h.1.mlp.c_fc.weight"]}


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def assert_partition(blocks: dict[str, tuple[str, ...]], names: list[str]):
    """Every name in exactly one block, in the model's order, under tags every logger accepts and none shares."""
    placed = [name for members in blocks.values() for name in members]
    assert sorted(placed) == sorted(names)
    for members in blocks.values():
        assert [names.index(name) for name in members] == sorted(names.index(name) for name in members)
    tags = [tag_segment(block) for block in blocks]
    assert len(set(tags)) == len(tags)
    assert all(re.fullmatch(r"[A-Za-z0-9_]+", tag) for tag in tags)


def component_names(layers: dict[str, str]) -> list[str]:
    return [f"{layer}/{component}" for layer, parts in layers.items() for component in parts.split()]
