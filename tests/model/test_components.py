"""Which parameter is what, by hand for every family."""

import re

import pytest
import torch
from torch import nn

from curvature_callbacks.model.components import components
from curvature_callbacks.model.layers import find_layers
from tests.families import FAMILIES, family

Table = dict[str, str]  # component: modules (`*` is a layer number) or raw parameters, in words

PROJECTIONS = "q_proj k_proj v_proj o_proj"
OUT = "q_proj k_proj v_proj out_proj"
GATED = "gate_proj up_proj down_proj"


def within(path: str, parts: str) -> str:
    return " ".join(f"{path}.{part}" for part in parts.split())


def decoder(*, attention: str = PROJECTIONS, mlp: str = GATED, norm: str = "", inner: str = "", head: str = "lm_head") -> Table:
    """Llama's layout: further norms of a layer in `norm`, of its attention in `inner`."""
    layer = "model.layers.*"
    norms = within(layer, "input_layernorm post_attention_layernorm " + norm)
    return {
        "embedding": "model.embed_tokens",
        "attention": within(f"{layer}.self_attn", attention),
        "mlp": within(f"{layer}.mlp", mlp),
        "norm": f"{norms} {within(f'{layer}.self_attn', inner)} model.norm",
        "head": head,
    }


def bert(base: str, *, attention: str = "query key value", tables: str = "", head: str = "cls.predictions") -> Table:
    layer = f"{base}.encoder.layer.*"
    transform = f"{head}.transform" if head.startswith("cls") else head
    return {
        "embedding": f"{within(f'{base}.embeddings', 'word_embeddings position_embeddings')} {tables}",
        "attention": f"{within(f'{layer}.attention.self', attention)} {layer}.attention.output.dense",
        "mlp": f"{layer}.intermediate.dense {layer}.output.dense",
        "norm": f"{base}.embeddings.LayerNorm {layer}.attention.output.LayerNorm {layer}.output.LayerNorm "
        f"{transform}.LayerNorm {transform}.layer_norm",
        "head": f"{head}.bias {transform}.dense",
    }


def sequence_pair(*, embedding: str, norm: str) -> Table:
    """BART's and Whisper's layers."""
    encoder, half = "model.encoder.layers.*", "model.decoder.layers.*"
    return {
        "embedding": embedding,
        "attention": " ".join(
            within(path, OUT) for path in (f"{encoder}.self_attn", f"{half}.self_attn", f"{half}.encoder_attn")
        ),
        "mlp": f"{within(encoder, 'fc1 fc2')} {within(half, 'fc1 fc2')}",
        "norm": f"{within(encoder, 'self_attn_layer_norm final_layer_norm')} "
        f"{within(half, 'self_attn_layer_norm encoder_attn_layer_norm final_layer_norm')} {norm}",
    }


def vision(layer: str, *, embedding: str, norm: str, attention: str = PROJECTIONS, own: str = "attention") -> Table:
    return {
        "embedding": embedding,
        "attention": within(f"{layer}.{own}", attention),
        "mlp": within(f"{layer}.mlp", "fc1 fc2"),
        "norm": norm,
        "head": "classifier",
    }


DEEPSEEK = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"
SHARED_EXPERTS = "shared_experts.gate_proj shared_experts.up_proj shared_experts.down_proj"
EXPERTS = "gate experts.gate_up_proj experts.down_proj"
STAGES = "swin.encoder.layers.*"
FEED_FORWARDS = "pre_feedforward_layernorm post_feedforward_layernorm"

EXPECTED: dict[str, Table] = {
    "gpt2": {
        "embedding": "transformer.wte transformer.wpe",
        "attention": within("transformer.h.*.attn", "c_attn c_proj"),
        "mlp": within("transformer.h.*.mlp", "c_fc c_proj"),
        "norm": "transformer.h.*.ln_1 transformer.h.*.ln_2 transformer.ln_f",
    },
    "llama": decoder(),
    "qwen2": decoder(),
    "qwen3": decoder(inner="q_norm k_norm"),
    "mistral": decoder(),
    "gemma": decoder(head=""),
    "gemma2": decoder(head="", norm=FEED_FORWARDS),
    "gemma3": decoder(head="", norm=FEED_FORWARDS, inner="q_norm k_norm"),
    "phi": {
        "embedding": "model.embed_tokens",
        "attention": within("model.layers.*.self_attn", "q_proj k_proj v_proj dense"),
        "mlp": within("model.layers.*.mlp", "fc1 fc2"),
        "norm": "model.layers.*.input_layernorm model.final_layernorm",
        "head": "lm_head",
    },
    "phi3": decoder(attention="qkv_proj o_proj", mlp="gate_up_proj down_proj"),
    "opt": {
        "embedding": within("model.decoder", "embed_tokens embed_positions"),
        "attention": within("model.decoder.layers.*.self_attn", OUT),
        "mlp": within("model.decoder.layers.*", "fc1 fc2"),
        "norm": within("model.decoder.layers.*", "self_attn_layer_norm final_layer_norm") + " model.decoder.final_layer_norm",
    },
    "gpt_neox": {
        "embedding": "gpt_neox.embed_in",
        "attention": within("gpt_neox.layers.*.attention", "query_key_value dense"),
        "mlp": within("gpt_neox.layers.*.mlp", "dense_h_to_4h dense_4h_to_h"),
        "norm": within("gpt_neox.layers.*", "input_layernorm post_attention_layernorm") + " gpt_neox.final_layer_norm",
        "head": "lm_head",
    },
    "bert": bert("bert", tables="bert.embeddings.token_type_embeddings"),
    "roberta": bert("roberta", tables="roberta.embeddings.token_type_embeddings", head="lm_head"),
    "distilbert": {
        "embedding": within("distilbert.embeddings", "word_embeddings position_embeddings"),
        "attention": within("distilbert.transformer.layer.*.attention", "q_lin k_lin v_lin out_lin"),
        "mlp": within("distilbert.transformer.layer.*.ffn", "lin1 lin2"),
        "norm": within("distilbert.transformer.layer.*", "sa_layer_norm output_layer_norm")
        + " distilbert.embeddings.LayerNorm vocab_layer_norm",
        "head": "vocab_transform vocab_projector",
    },
    "deberta": bert("deberta", attention="q_bias v_bias in_proj pos_proj pos_q_proj", tables="deberta.encoder.rel_embeddings"),
    "deberta_v2": bert("deberta", attention="query_proj key_proj value_proj", tables="deberta.encoder.rel_embeddings"),
    "modernbert": {
        "embedding": "model.embeddings.tok_embeddings",
        "attention": within("model.layers.*.attn", "Wqkv Wo"),
        "mlp": within("model.layers.*.mlp", "Wi Wo"),
        "norm": "model.embeddings.norm model.layers.*.attn_norm model.layers.*.mlp_norm model.final_norm head.norm",
        "head": "head.dense decoder",
    },
    "t5": {
        "embedding": "shared",
        "attention": " ".join(
            within(f"{path}.layer.*.{own}", "q k v o relative_attention_bias")
            for path in ("encoder.block.*", "decoder.block.*")
            for own in ("SelfAttention", "EncDecAttention")
        ),
        "mlp": " ".join(within(f"{half}.block.*.layer.*.DenseReluDense", "wi wo") for half in ("encoder", "decoder")),
        "norm": " ".join(f"{half}.block.*.layer.*.layer_norm {half}.final_layer_norm" for half in ("encoder", "decoder")),
    },
    "bart": sequence_pair(
        embedding="model.shared model.encoder.embed_positions model.decoder.embed_positions",
        norm="model.encoder.layernorm_embedding model.decoder.layernorm_embedding",
    ),
    "vit": vision(
        "vit.layers.*",
        embedding=within("vit.embeddings", "cls_token position_embeddings patch_embeddings.projection"),
        norm=within("vit.layers.*", "layernorm_before layernorm_after") + " vit.layernorm",
    ),
    "dinov2": vision(
        "dinov2.encoder.layer.*",
        embedding=within("dinov2.embeddings", "cls_token mask_token position_embeddings patch_embeddings.projection"),
        norm=within("dinov2.encoder.layer.*", "norm1 norm2 layer_scale1.lambda1 layer_scale2.lambda1") + " dinov2.layernorm",
    ),
    "swin": vision(
        f"{STAGES}.blocks.*",
        embedding=f"swin.embeddings.patch_embeddings.projection {STAGES}.downsample.reduction",
        attention=PROJECTIONS + " relative_position_bias.relative_position_bias_table",
        norm=f"swin.embeddings.norm {within(f'{STAGES}.blocks.*', 'layernorm_before layernorm_after')} "
        f"{STAGES}.downsample.norm swin.layernorm",
    ),
    "clip_vision": vision(
        "vision_model.encoder.layers.*",
        own="self_attn",
        attention=OUT,
        embedding=within("vision_model.embeddings", "class_embedding patch_embedding position_embedding"),
        norm=within("vision_model", "pre_layrnorm post_layernorm encoder.layers.*.layer_norm1 encoder.layers.*.layer_norm2"),
    ),
    "whisper": sequence_pair(
        embedding=within("model.encoder", "conv1 conv2 embed_positions") + " model.decoder.embed_tokens "
        "model.decoder.embed_positions",
        norm="model.encoder.layer_norm model.decoder.layer_norm",
    ),
    "wav2vec2": {
        "embedding": "wav2vec2.masked_spec_embed wav2vec2.feature_projection.projection wav2vec2.encoder.pos_conv_embed.conv",
        "conv": "wav2vec2.feature_extractor.conv_layers.*.conv",
        "attention": within("wav2vec2.encoder.layers.*.attention", OUT),
        "mlp": within("wav2vec2.encoder.layers.*.feed_forward", "intermediate_dense output_dense"),
        "norm": "wav2vec2.feature_extractor.conv_layers.*.layer_norm wav2vec2.feature_projection.layer_norm "
        "wav2vec2.encoder.layer_norm wav2vec2.encoder.layers.*.layer_norm wav2vec2.encoder.layers.*.final_layer_norm",
        "head": "lm_head",
    },
    "mixtral": decoder(mlp=EXPERTS),
    "qwen3_moe": decoder(mlp=EXPERTS, inner="q_norm k_norm"),
    "deepseek_v3": decoder(attention=DEEPSEEK, mlp=f"{GATED} {EXPERTS} {SHARED_EXPERTS}", inner="q_a_layernorm kv_a_layernorm"),
    "gpt_oss": decoder(
        attention=PROJECTIONS + " sinks",
        mlp="router experts.gate_up_proj experts.gate_up_proj_bias experts.down_proj experts.down_proj_bias",
    ),
    "mamba": {
        "embedding": "backbone.embeddings",
        "mixer": within("backbone.layers.*.mixer", "A_log D conv1d in_proj x_proj dt_proj out_proj"),
        "norm": "backbone.layers.*.norm backbone.norm_f",
    },
    "mamba2": {
        "embedding": "backbone.embeddings",
        "mixer": within("backbone.layers.*.mixer", "A_log D dt_bias conv1d in_proj out_proj"),
        "norm": "backbone.layers.*.norm backbone.layers.*.mixer.norm backbone.norm_f",
        "head": "lm_head",
    },
    "resnet": {
        "embedding": "resnet.embedder.embedder.convolution",
        "conv": within("resnet.encoder.stages.*.layers.*", "layer.*.convolution shortcut.convolution"),
        "norm": "resnet.embedder.embedder.normalization "
        + within("resnet.encoder.stages.*.layers.*", "layer.*.normalization shortcut.normalization"),
        "head": "classifier.1",
    },
    "convnext": {
        "embedding": "convnext.embeddings.patch_embeddings",
        "conv": "convnext.encoder.stages.*.layers.*.dwconv convnext.encoder.stages.1.downsampling_layer.1",
        "mlp": within("convnext.encoder.stages.*.layers.*", "pwconv1 pwconv2"),
        "norm": "convnext.embeddings.layernorm convnext.layernorm convnext.encoder.stages.1.downsampling_layer.0 "
        + within("convnext.encoder.stages.*.layers.*", "layernorm layer_scale_parameter"),
        "head": "classifier",
    },
}


def expected(table: Table, name: str) -> list[str]:
    """The components whose modules or raw parameters hold `name`."""
    found = []
    for component, paths in table.items():
        patterns = [re.escape(path).replace(r"\*", r"\d+") for path in paths.split()]
        own = r"(\.(weight|bias|parametrizations\.weight\.original[01]))?"
        if any(re.fullmatch(pattern + own, name) for pattern in patterns):
            found.append(component)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_components_of_hugging_face_families(name: str):
    model = family(name)
    found = components(model, find_layers(model))
    assert list(found) == [parameter for parameter, _ in model.named_parameters()]
    assert {parameter: [component] for parameter, component in found.items()} == {
        parameter: expected(EXPECTED[name], parameter) for parameter in found
    }
    assert "other" not in found.values()
    assert set(found.values()) == {component for component, paths in EXPECTED[name].items() if paths}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("gpt2", "lm_head.weight"),
        ("whisper", "proj_out.weight"),
        ("opt", "lm_head.weight"),
        ("bert", "cls.predictions.decoder.weight"),
    ],
)
def test_an_untied_head_is_a_head(name: str, head: str):
    """By its place, with no table of names: also the weight that is tied by default."""
    model = family(name, tie_word_embeddings=False)
    assert components(model, find_layers(model))[head] == "head"


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(2))


class RMS(nn.Module):
    """A norm whose class does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


class ResidualAttentionBlock(nn.Module):
    """A layer whose class says attention and that holds its feed-forward flat; norms by attribute names alone."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ls1 = RMS(), Gain()
        self.attn = nn.MultiheadAttention(2, 1)
        self.linear1, self.linear2 = nn.Linear(2, 4), nn.Linear(4, 2)
        self.temperature = nn.Parameter(torch.ones(2))


class Block(nn.Module):
    """Projections and experts without a module around them that says what they are; a raw vector."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(2, 2), nn.Linear(2, 2)
        self.up, self.down = nn.Linear(2, 4), nn.Linear(4, 2)
        self.gate = nn.Parameter(torch.ones(2))


class Network(nn.Module):
    """Modules in an order that misleads: the head first, the embedding last."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(2))
        self.latents = nn.Parameter(torch.ones(2, 2))
        self.head = nn.Linear(2, 3)
        self.stem = nn.Conv1d(2, 2, 1)
        self.blocks = nn.ModuleList([ResidualAttentionBlock(), Block()])
        self.transform = nn.Linear(2, 2)
        self.table = nn.Embedding(3, 2)
        self.pos_embed = nn.Parameter(torch.ones(2, 2))


def test_names_classes_and_places():
    found = components(model := Network(), find_layers(model))
    assert found == {
        "logit_scale": "other",
        "latents": "embedding",
        "pos_embed": "embedding",
        "head.weight": "head",
        "head.bias": "head",
        "stem.weight": "embedding",
        "stem.bias": "embedding",
        "blocks.0.temperature": "attention",  # the class of its layer is all there is
        "blocks.0.ln_1.weight": "norm",
        "blocks.0.ls1.lambda1": "norm",
        "blocks.0.attn.in_proj_weight": "attention",
        "blocks.0.attn.in_proj_bias": "attention",
        "blocks.0.attn.out_proj.weight": "attention",
        "blocks.0.attn.out_proj.bias": "attention",
        "blocks.0.linear1.weight": "mlp",
        "blocks.0.linear1.bias": "mlp",
        "blocks.0.linear2.weight": "mlp",
        "blocks.0.linear2.bias": "mlp",
        "blocks.1.gate": "other",
        "blocks.1.to_q.weight": "attention",
        "blocks.1.to_q.bias": "attention",
        "blocks.1.to_out.weight": "mlp",  # nothing tells: the name of its layer would
        "blocks.1.to_out.bias": "mlp",
        "blocks.1.up.weight": "mlp",
        "blocks.1.up.bias": "mlp",
        "blocks.1.down.weight": "mlp",
        "blocks.1.down.bias": "mlp",
        "transform.weight": "head",
        "transform.bias": "head",
        "table.weight": "embedding",
    }


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rnn, self.decoder = nn.Embedding(5, 2), nn.LSTM(2, 2), nn.Linear(2, 5)


def test_a_recurrent_model():
    found = components(model := LanguageModel(), find_layers(model))
    kinds = {name.partition(".")[0]: kind for name, kind in found.items()}
    assert kinds == {"encoder": "embedding", "rnn": "mixer", "decoder": "head"}


def test_a_norm_over_an_image_is_a_norm():
    """Its weight has more than one axis; that of a linear layer in a module called norm has two and is none."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.LayerNorm([2, 3, 3]), nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    found = components(model, find_layers(model))
    assert found["1.weight"] == found["1.bias"] == found["2.1.weight"] == "norm"
    adaptive = nn.ModuleDict({"norm": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert components(adaptive, find_layers(adaptive))["norm.weight"] == "mlp"
