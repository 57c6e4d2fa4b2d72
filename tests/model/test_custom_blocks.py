"""Custom blocks: a mapping, a function."""

from typing import Any

import pytest
from torch import nn

from curvature_callbacks import ConfigurationError
from curvature_callbacks.model.blocks import group_blocks
from tests.families import family
from tests.model.block_cases import EARLY, assert_partition, trainable


def test_a_mapping_by_module_paths_and_parameter_names():
    model = family("gpt2")
    names = trainable(model)
    blocks = group_blocks(model, names, EARLY)
    assert_partition(blocks, names)
    assert list(blocks) == ["early", "other", "late"]
    assert blocks["early"] == tuple(name for name in names if ".wte" in name or ".wpe" in name or ".h.0." in name)
    assert blocks["late"] == ("transformer.h.1.mlp.c_fc.weight",)


def test_a_prefix_of_a_name_is_no_module():
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "layer_two": nn.Linear(2, 2)})
    blocks = group_blocks(model, trainable(model), {"one": ["layer"]})
    assert blocks == {"one": ("layer.weight", "layer.bias"), "other": ("layer_two.weight", "layer_two.bias")}


def test_a_block_of_the_users_own_called_other_takes_what_is_left():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    assert group_blocks(model, trainable(model), {"other": ["a"]}) == {"other": tuple(trainable(model))}


def test_a_mapping_that_covers_everything_has_no_other():
    model = family("gpt2")
    assert list(group_blocks(model, trainable(model), {"all": ["transformer"]})) == ["all"]


def test_a_mapping_may_name_a_tied_parameter_by_either_name():
    model = family("gpt2")
    wte = ("transformer.wte.weight",)
    assert group_blocks(model, trainable(model), {"head": ["lm_head"]})["head"] == wte
    both = {"head": ["lm_head.weight", "transformer.wte"]}
    assert group_blocks(model, trainable(model), both)["head"] == wte


def test_a_mapping_may_name_what_is_frozen():
    """A schedule may unfreeze it later."""
    model = family("gpt2")
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    assert list(group_blocks(model, trainable(model), EARLY)) == ["other", "late"]


@pytest.mark.parametrize(
    ("mapping", "match"),
    [
        ({"a": ["transformer.h.0.atn"]}, r"names 'transformer.h.0.atn' in block 'a'.*did you mean 'transformer.h.0.attn'"),
        ({"a": ["h.0"]}, "names 'h.0' in block 'a', which is no parameter of the model and no module with parameters"),
        ({"a": [""]}, "names '' in block 'a'"),
        ({"a": ["transformer.drop"]}, "no module with parameters"),
        ({"a": ["transformer.h.0"], "b": ["transformer.h"]}, r"into block 'a' and, as 'transformer.h', into 'b'"),
        ({"a": ["transformer.wte"], "b": ["lm_head"]}, r"'transformer.wte.weight' into block 'a' and, as 'lm_head'"),
        ({"a": "transformer"}, "must map block 'a' to a list of parameter names or module paths, got 'transformer'"),
        ({"a": [3]}, "must map block 'a' to a list"),
        ({"a": None}, "must map block 'a' to a list"),
        ({3: ["transformer"]}, "must name blocks by strings with a letter or digit, got 3"),
        ({"--": ["transformer"]}, "must name blocks by strings with a letter or digit, got '--'"),
        ({"a b": ["transformer.wte"], "a-b": ["transformer.wpe"]}, "same tag"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(mapping: Any, match: str):
    model = family("gpt2")
    with pytest.raises(ConfigurationError, match=match):
        group_blocks(model, trainable(model), mapping)


def test_a_function():
    model = family("gpt2")
    names, seen = trainable(model), dict[str, nn.Parameter]()

    def by_shape(name: str, parameter: nn.Parameter) -> str | None:
        seen[name] = parameter
        return None if "wpe" in name else "vectors" if parameter.dim() == 1 else "matrices"

    blocks = group_blocks(model, names, by_shape)
    assert_partition(blocks, names)
    assert list(blocks) == ["matrices", "other", "vectors"]
    assert blocks["other"] == ("transformer.wpe.weight",)
    assert blocks["vectors"] == tuple(name for name in names if name.endswith("bias") or ".ln_" in name)
    assert list(seen) == names
    assert all(seen[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda name, parameter: 3, "must name blocks by strings with a letter or digit, got 3"),
        (lambda name, parameter: "", "must name blocks by strings"),
        (lambda name, parameter: {}[name], "`block_structure` failed for parameter 'weight': KeyError"),
        (lambda name: name, "`block_structure` failed for parameter 'weight': TypeError"),
    ],
)
def test_a_function_that_answers_nonsense_is_refused(function: Any, match: str):
    with pytest.raises(ConfigurationError, match=match):
        group_blocks(nn.Linear(2, 2), ["weight", "bias"], function)
