import re

import pytest
from torch import nn

from curvature_callbacks import ConfigurationError
from curvature_callbacks.model.blocks import group_blocks
from curvature_callbacks.record import tag_segment
from tests.cases import CASES, FAMILIES, ConvNet, family

DECODER = ("embed_tokens", "layers.0", "layers.1", "norm")
DEBERTA = ("embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.rel_embeddings", "cls")
UNTIED = ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe", "gpt_oss")
EXPECTED = {
    "gpt2": ["wte", "wpe", "h.0", "h.1", "ln_f"],
    **dict.fromkeys(UNTIED, (*DECODER, "lm_head")),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), DECODER),
    "phi": ["embed_tokens", "layers.0", "layers.1", "final_layernorm", "lm_head"],
    "opt": ["embed_tokens", "embed_positions", "final_layer_norm", "layers.0", "layers.1"],
    "gpt_neox": ["embed_in", "layers.0", "layers.1", "final_layer_norm", "lm_head"],
    "bert": ["embeddings", "encoder.layer.0", "encoder.layer.1", "cls"],
    "roberta": ["embeddings", "encoder.layer.0", "encoder.layer.1", "lm_head"],
    "distilbert": [
        "embeddings",
        "transformer.layer.0",
        "transformer.layer.1",
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
    ],
    **dict.fromkeys(("deberta", "deberta_v2"), DEBERTA),
    "modernbert": ["embeddings", "layers.0", "layers.1", "final_norm", "head", "decoder"],
    "t5": [
        "shared",
        "encoder.block.0",
        "encoder.block.1",
        "encoder.final_layer_norm",
        "decoder.block.0",
        "decoder.block.1",
        "decoder.final_layer_norm",
    ],
    "bart": [
        "shared",
        *(
            f"{half}.{part}"
            for half in ("encoder", "decoder")
            for part in ("embed_positions", "layers.0", "layers.1", "layernorm_embedding")
        ),
    ],
    "vit": ["embeddings", "layers.0", "layers.1", "layernorm", "classifier"],
    "dinov2": ["embeddings", "encoder.layer.0", "encoder.layer.1", "layernorm", "classifier"],
    "swin": ["embeddings", "encoder.layers.0", "encoder.layers.1", "layernorm", "classifier"],
    "clip_vision": [
        "vision_model.embeddings",
        "vision_model.pre_layrnorm",
        "vision_model.encoder.layers.0",
        "vision_model.encoder.layers.1",
        "vision_model.post_layernorm",
        "classifier",
    ],
    "whisper": [
        "encoder.conv1",
        "encoder.conv2",
        "encoder.layers.0",
        "encoder.layers.1",
        "encoder.layer_norm",
        "decoder.embed_tokens",
        "decoder.embed_positions",
        "decoder.layers.0",
        "decoder.layers.1",
        "decoder.layer_norm",
    ],
    "wav2vec2": [
        "masked_spec_embed",
        "feature_extractor.conv_layers.0",
        "feature_extractor.conv_layers.1",
        "feature_projection",
        "encoder.pos_conv_embed",
        "encoder.layer_norm",
        "encoder.layers.0",
        "encoder.layers.1",
        "lm_head",
    ],
    "mamba": ["embeddings", "layers.0", "layers.1", "norm_f"],
    "resnet": ["embedder", "encoder.stages.0", "encoder.stages.1", "classifier"],
    "convnext": ["embeddings", "encoder.stages.0", "encoder.stages.1", "layernorm", "classifier"],
}


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


def test_all_families_have_an_expectation():
    assert set(EXPECTED) == set(FAMILIES)
    assert len(FAMILIES) >= 30


@pytest.mark.parametrize("name", EXPECTED)
def test_layer_blocks_of_hugging_face_families(name: str):
    model = family(name)
    blocks = group_blocks(model, trainable(model))
    assert sorted(blocks) == sorted(EXPECTED[name])
    assert_partition(blocks, trainable(model))


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


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "opt"])
def test_a_tied_parameter_belongs_to_one_block(name: str):
    model = family(name)
    aliases = [alias for alias, _ in model.named_parameters(remove_duplicate=False)]
    placed = [member for members in group_blocks(model, trainable(model)).values() for member in members]
    assert len(placed) == len(set(placed)) == len(trainable(model)) < len(aliases)


class Plain(nn.Module):
    """Lists in lists, a raw parameter beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(nn.init.ones_(nn.Linear(1, 1).weight.data))
        self.stem = nn.Linear(2, 2)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
        self.experts = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ConvNet(), ["conv1", "bn1", "layer1.0", "layer1.1", "fc"]),
        (Plain(), ["scale", "stem", "body.0", "body.2", "experts.0"]),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["0", "2"]),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)), ["0", "1"]),
        (nn.Linear(2, 2), ["weight", "bias"]),
        (CASES["encoder"].build(), ["positions", "encoder.layers.0", "encoder.layers.1", "head"]),
    ],
    ids=["torchvision", "plain", "sequential", "nested", "one_layer", "torch_transformer"],
)
def test_layer_blocks_of_plain_models(model: nn.Module, expected: list[str]):
    blocks = group_blocks(model, trainable(model))
    assert list(blocks) == expected
    assert_partition(blocks, trainable(model))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net = inner


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit"])
def test_wrapping_a_model_renames_nothing(name: str):
    """A LightningModule holds its network under some name of its own."""
    model = Wrapped(family(name))
    assert sorted(group_blocks(model, trainable(model))) == sorted(EXPECTED[name])


def test_blocks_of_some_parameters_only():
    model = family("gpt2")
    names = [name for name in trainable(model) if "attn" in name]
    assert_partition(group_blocks(model, names), names)


def test_layers_are_padded_so_that_they_sort():
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])
    tags = [tag_segment(block) for block in group_blocks(model, trainable(model))]
    assert tags == sorted(tags)


def test_an_unknown_structure_is_named():
    with pytest.raises(ConfigurationError, match="`block_structure` must be one of 'layer', 'parameter', 'none'"):
        group_blocks(nn.Linear(2, 2), ["weight"], "module")


def test_blocks_no_logger_could_tell_apart_are_refused():
    model = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a-b": nn.Linear(2, 2)})
    with pytest.raises(ConfigurationError, match="same tag"):
        group_blocks(model, trainable(model))
