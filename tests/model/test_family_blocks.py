"""Blocks of every Hugging Face family: its layers, and the components of each."""

import re

import pytest
from torch import nn

from curvature_callbacks.model.blocks import group_blocks
from tests.cases import CASES
from tests.families import FAMILIES, family
from tests.model.block_cases import assert_partition, component_names, trainable

LAYER = "attention norm mlp"


DECODER = {"embed_tokens": "embedding", "layers.0": LAYER, "layers.1": LAYER, "norm": "norm"}


UNTIED = ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


TEXT = {"embeddings": "embedding norm", "encoder.layer.0": LAYER, "encoder.layer.1": LAYER}


DEBERTA = TEXT | {"encoder.rel_embeddings": "embedding", "cls": "head norm"}


# family: its layers, and the components of each
EXPECTED: dict[str, dict[str, str]] = {
    "gpt2": {"wte": "embedding", "wpe": "embedding", "h.0": LAYER, "h.1": LAYER, "ln_f": "norm"},
    **dict.fromkeys(UNTIED, DECODER | {"lm_head": "head"}),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), DECODER),
    "phi": {"embed_tokens": "embedding", "layers.0": LAYER, "layers.1": LAYER, "final_layernorm": "norm", "lm_head": "head"},
    "opt": {
        "embed_tokens": "embedding",
        "embed_positions": "embedding",
        "final_layer_norm": "norm",
        "layers.0": LAYER,
        "layers.1": LAYER,
    },
    "gpt_neox": {"embed_in": "embedding", "layers.0": LAYER, "layers.1": LAYER, "final_layer_norm": "norm", "lm_head": "head"},
    "bert": TEXT | {"cls": "head norm"},
    "roberta": TEXT | {"lm_head": "head norm"},
    "distilbert": {
        "embeddings": "embedding norm",
        "transformer.layer.0": LAYER,
        "transformer.layer.1": LAYER,
        "vocab_transform": "head",
        "vocab_layer_norm": "norm",
        "vocab_projector": "head",
    },
    **dict.fromkeys(("deberta", "deberta_v2"), DEBERTA),
    "modernbert": {
        "embeddings": "embedding norm",
        "layers.0": LAYER,
        "layers.1": LAYER,
        "final_norm": "norm",
        "head": "head norm",
        "decoder": "head",
    },
    "t5": {
        "shared": "embedding",
        "encoder.block.0": LAYER,
        "encoder.block.1": LAYER,
        "encoder.final_layer_norm": "norm",
        "decoder.block.0": LAYER,
        "decoder.block.1": LAYER,
        "decoder.final_layer_norm": "norm",
    },
    "bart": {
        "shared": "embedding",
        "encoder.embed_positions": "embedding",
        "encoder.layers.0": LAYER,
        "encoder.layers.1": LAYER,
        "encoder.layernorm_embedding": "norm",
        "decoder.embed_positions": "embedding",
        "decoder.layers.0": LAYER,
        "decoder.layers.1": LAYER,
        "decoder.layernorm_embedding": "norm",
    },
    "vit": {"embeddings": "embedding", "layers.0": LAYER, "layers.1": LAYER, "layernorm": "norm", "classifier": "head"},
    "dinov2": {
        "embeddings": "embedding",
        "encoder.layer.0": LAYER,
        "encoder.layer.1": LAYER,
        "layernorm": "norm",
        "classifier": "head",
    },
    "swin": {
        "embeddings": "embedding norm",
        "encoder.layers.0": LAYER + " embedding",  # the patch merging at its end
        "encoder.layers.1": LAYER,
        "layernorm": "norm",
        "classifier": "head",
    },
    "clip_vision": {
        "vision_model.embeddings": "embedding",
        "vision_model.pre_layrnorm": "norm",
        "vision_model.encoder.layers.0": LAYER,
        "vision_model.encoder.layers.1": LAYER,
        "vision_model.post_layernorm": "norm",
        "classifier": "head",
    },
    "whisper": {
        "encoder.conv1": "embedding",
        "encoder.conv2": "embedding",
        "encoder.layers.0": LAYER,
        "encoder.layers.1": LAYER,
        "encoder.layer_norm": "norm",
        "decoder.embed_tokens": "embedding",
        "decoder.embed_positions": "embedding",
        "decoder.layers.0": LAYER,
        "decoder.layers.1": LAYER,
        "decoder.layer_norm": "norm",
    },
    "wav2vec2": {
        "masked_spec_embed": "embedding",
        "feature_extractor.conv_layers.0": "conv norm",
        "feature_extractor.conv_layers.1": "conv",
        "feature_projection": "embedding norm",
        "encoder.pos_conv_embed": "embedding",
        "encoder.layer_norm": "norm",
        "encoder.layers.0": LAYER,
        "encoder.layers.1": LAYER,
        "lm_head": "head",
    },
    "mamba": {"embeddings": "embedding", "layers.0": "norm mixer", "layers.1": "norm mixer", "norm_f": "norm"},
    "mamba2": {
        "embeddings": "embedding",
        "layers.0": "norm mixer",
        "layers.1": "norm mixer",
        "norm_f": "norm",
        "lm_head": "head",
    },
    "resnet": {
        "embedder": "embedding norm",
        "encoder.stages.0": "conv norm",
        "encoder.stages.1": "conv norm",
        "classifier": "head",
    },
    "convnext": {
        "embeddings": "embedding norm",
        "encoder.stages.0": "conv norm mlp",
        "encoder.stages.1": "conv norm mlp",
        "layernorm": "norm",
        "classifier": "head",
    },
}


def test_all_families_have_an_expectation():
    assert set(EXPECTED) == set(FAMILIES)
    assert len(FAMILIES) == 34


@pytest.mark.parametrize("name", EXPECTED)
def test_layer_blocks_of_hugging_face_families(name: str):
    model = family(name)
    blocks = group_blocks(model, trainable(model))
    assert sorted(blocks) == sorted(EXPECTED[name])
    assert_partition(blocks, trainable(model))


@pytest.mark.parametrize("name", EXPECTED)
def test_component_blocks_of_hugging_face_families(name: str):
    model = family(name)
    blocks = group_blocks(model, trainable(model), "component")
    assert sorted(blocks) == sorted(component_names(EXPECTED[name]))
    assert_partition(blocks, trainable(model))


@pytest.mark.parametrize("structure", ["component", "module", "parameter"])
@pytest.mark.parametrize("name", EXPECTED)
def test_finer_blocks_lie_within_layers(name: str, structure: str):
    model = family(name)
    layer_of = {member: layer for layer, members in group_blocks(model, trainable(model)).items() for member in members}
    for block, members in group_blocks(model, trainable(model), structure).items():
        assert len({layer_of[member] for member in members}) == 1, block


@pytest.mark.parametrize("name", EXPECTED)
def test_a_block_holds_the_parameters_under_its_name(name: str):
    model = family(name)
    for block, members in group_blocks(model, trainable(model)).items():
        assert all(re.search(rf"(^|\.){re.escape(block)}(\.|$)", member) for member in members), block


@pytest.mark.parametrize("structure", ["parameter", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_structures(name: str, structure: str):
    model = family(name)
    names = trainable(model)
    blocks = group_blocks(model, names, structure)
    assert_partition(blocks, names)
    assert list(blocks) == (names if structure == "parameter" else ["model"])


@pytest.mark.parametrize("name", FAMILIES)
def test_module_blocks_are_the_modules_with_parameters_of_their_own(name: str):
    model = family(name)
    names = trainable(model)
    blocks = group_blocks(model, names, "module")
    assert_partition(blocks, names)
    expected = {
        frozenset(f"{path}.{own}".lstrip(".") for own, value in module.named_parameters(recurse=False)) & set(names)
        for path, module in model.named_modules()
    } - {frozenset()}
    if name == "wav2vec2":  # the weight normalisation of a convolution belongs to the convolution
        parts = {members for members in expected if any("pos_conv_embed" in member for member in members)}
        expected = (expected - parts) | {frozenset().union(*parts)}
    assert {frozenset(members) for members in blocks.values()} == expected


def test_module_blocks_by_name():
    model = family("gpt2")
    expected = ["wte", "wpe"]
    for layer in ("h.0", "h.1"):
        expected += [f"{layer}.{part}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")]
    assert list(group_blocks(model, trainable(model), "module")) == [*expected, "ln_f"]


def test_raw_parameters_of_the_model_are_a_block_named_by_its_class():
    model = CASES["encoder"].build()
    blocks = group_blocks(model, trainable(model), "module")
    assert blocks["Encoder"] == ("positions",)
    assert list(group_blocks(nn.Linear(2, 2), ["weight", "bias"], "module")) == ["Linear"]


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "opt"])
def test_a_tied_parameter_belongs_to_one_block(name: str):
    model = family(name)
    aliases = [alias for alias, _ in model.named_parameters(remove_duplicate=False)]
    placed = [member for members in group_blocks(model, trainable(model)).values() for member in members]
    assert len(placed) == len(set(placed)) == len(trainable(model)) < len(aliases)
