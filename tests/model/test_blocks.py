import json
import re
from typing import Any

import pytest
import torch
from torch import nn

from curvature_callbacks import ConfigurationError, CurvatureMonitor, compute_fisher_spectrum
from curvature_callbacks.model.blocks import group_blocks
from curvature_callbacks.probes import CapturedProbes
from curvature_callbacks.record import tag_segment
from tests.cases import CASES, FAMILIES, ConvNet, family

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


class Plain(nn.Module):
    """Lists in lists, a raw parameter beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1))
        self.stem = nn.Linear(2, 2)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
        self.experts = nn.ModuleList([nn.Linear(2, 2)])


class Bottleneck(nn.Module):
    """The block of torchvision's ResNet-50, by attribute names."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))


class ResNet(nn.Module):
    """torchvision's ResNet by attribute names: stem, four stages of two bottlenecks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, bias=False), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)
        self.layer1 = nn.Sequential(Bottleneck(4, 2, 1), Bottleneck(8, 2, 1))
        self.layer2 = nn.Sequential(Bottleneck(8, 3, 2), Bottleneck(12, 3, 1))
        self.layer3 = nn.Sequential(Bottleneck(12, 4, 2), Bottleneck(16, 4, 1))
        self.layer4 = nn.Sequential(Bottleneck(16, 5, 2), Bottleneck(20, 5, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(20, 3)


class LeNet(nn.Module):
    """No list at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)


class ListedHead(nn.Module):
    """The only list is the head: what is before it is no stem."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)
        self.classifier = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class OnlyLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def vgg() -> nn.Module:
    features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3))
    classifier = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout(), nn.Linear(2, 3))
    return nn.ModuleDict({"features": features, "classifier": classifier})


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))),
        nn.Sequential(nn.Linear(2, 2)),
        nn.Linear(2, 2),
    )


STAGES = {f"layer{stage}.{block}": "conv norm" for stage in (1, 2, 3, 4) for block in (0, 1)}
PLAIN: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "small_resnet": (
        ConvNet(),
        {"conv1": "embedding", "bn1": "norm", "layer1.0": "conv norm", "layer1.1": "conv norm", "fc": "head"},
    ),
    "resnet": (ResNet(), {"conv1": "embedding", "bn1": "norm", **STAGES, "fc": "head"}),
    "vgg": (
        vgg(),
        {"features.0": "conv", "features.1": "norm", "features.3": "conv", "classifier.0": "head", "classifier.3": "head"},
    ),
    "lenet": (LeNet(), {"conv1": "conv", "conv2": "conv", "fc1": "mlp", "fc2": "head"}),
    "listed_head": (ListedHead(), {"conv1": "conv", "conv2": "conv", "classifier.0": "head", "classifier.2": "head"}),
    "plain": (
        Plain(),
        {"scale": "embedding", "stem": "embedding", "body.0": "mlp", "body.2": "mlp", "experts.0": "mlp"},
    ),
    "sequential": (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), {"0": "mlp", "2": "head"}),
    "nested": (nested(), {"0": "mlp norm", "1": "mlp", "2": "head"}),
    "only_layers": (OnlyLayers(), {"layers.0": "mlp", "layers.1": "head"}),
    "one_layer": (nn.Linear(2, 2), {"weight": "mlp", "bias": "mlp"}),
    "torch_transformer": (
        CASES["encoder"].build(),
        {
            "positions": "embedding",
            "encoder.layers.0": "attention mlp norm",
            "encoder.layers.1": "attention mlp norm",
            "head": "head",
        },
    ),
    "torch_encoder_decoder": (
        nn.Transformer(4, 2, 2, 2, 6, batch_first=True),
        {
            **{f"encoder.layers.{i}": "attention mlp norm" for i in (0, 1)},
            "encoder.norm": "norm",
            **{f"decoder.layers.{i}": "attention mlp norm" for i in (0, 1)},
            "decoder.norm": "norm",
        },
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_blocks_of_plain_models(name: str):
    model, expected = PLAIN[name]
    layers = group_blocks(model, trainable(model))
    assert list(layers) == list(expected)
    assert_partition(layers, trainable(model))
    parts = group_blocks(model, trainable(model), "component")
    assert list(parts) == component_names(expected)
    assert_partition(parts, trainable(model))


def test_layers_are_padded_so_that_they_sort():
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])
    for structure in ("layer", "component"):
        tags = [tag_segment(block) for block in group_blocks(model, trainable(model), structure)]
        assert tags == sorted(tags)


def test_an_unknown_structure_is_named():
    every = "`block_structure` must be one of 'layer', 'component', 'module', 'parameter', 'none', a mapping"
    for wrong in ("layers", 3, None, ["layer"]):
        with pytest.raises(ConfigurationError, match=every):
            group_blocks(nn.Linear(2, 2), ["weight"], wrong)


def test_blocks_no_logger_could_tell_apart_are_refused():
    model = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a-b": nn.Linear(2, 2)})
    with pytest.raises(ConfigurationError, match="same tag"):
        group_blocks(model, trainable(model))


EARLY = {"early": ["transformer.wte", "transformer.wpe", "transformer.h.0"], "late": ["transformer.h.1.mlp.c_fc.weight"]}


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


@pytest.mark.parametrize(
    ("structure", "match"),
    [({"a": ["nowhere"]}, "names 'nowhere'"), (lambda name, parameter: 3, "must name blocks")],
    ids=["mapping", "function"],
)
def test_blocks_are_checked_before_there_is_data(structure: Any, match: str):
    """Probes that only watch the loop have no batch yet."""
    probes = CapturedProbes(num_microbatches=1, microbatch_size=2)
    monitor = CurvatureMonitor(nn.Linear(2, 2), probes=probes, loss="mse", block_structure=structure)
    with pytest.raises(ConfigurationError, match=match):
        monitor.check()


def test_blocks_are_checked_for_what_is_measured_only():
    probes = CapturedProbes(num_microbatches=1, microbatch_size=2)
    asked: list[str] = []
    monitor = CurvatureMonitor(
        nn.Linear(2, 2),
        probes=probes,
        loss="mse",
        params_filter=lambda name, parameter: name == "bias",
        block_structure=lambda name, parameter: asked.append(name),
    )
    monitor.check()
    assert asked == ["bias"]


@pytest.mark.parametrize("structure", ["component", "module", {"first": ["0"]}, lambda name, parameter: name[0]])
def test_spectra_of_every_structure_are_those_of_one_fisher(structure: Any):
    model = CASES["mlp"].model()
    batch = CASES["mlp"].microbatches((6,))[0]
    blocks = group_blocks(model, trainable(model), structure)
    spectra = compute_fisher_spectrum(model, batch, loss="cross_entropy", block_structure=structure)
    whole = compute_fisher_spectrum(model, batch, loss="cross_entropy", block_structure="none")
    assert list(spectra.blocks) == list(blocks)
    torch.testing.assert_close(spectra.full.eigenvalues, whole.full.eigenvalues)


def test_structures_survive_json():
    """LightningCLI builds callbacks from YAML."""
    model = family("gpt2")
    for structure in (EARLY, "component"):
        again = json.loads(json.dumps(structure))
        assert group_blocks(model, trainable(model), again) == group_blocks(model, trainable(model), structure)
