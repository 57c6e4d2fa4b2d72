"""Hugging Face families, tiny: every layer that the package has to know, in a model of a few thousand parameters."""

from typing import Any

import transformers
from torch import nn

VOCABULARY = 11


CLASSES = 3


def hugging_face(model: str, config: str, **options: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**options))


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 4}


EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 6}


SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_labels": CLASSES,
}


SPEECH = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 12,
    "n_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


RESNET = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 2], "num_labels": CLASSES}


# family: (model class, configuration class, its arguments)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT | {"num_key_value_heads": 1}),
    "opt": ("OPTForCausalLM", "OPTConfig", TEXT | {"ffn_dim": 12, "word_embed_proj_dim": 8}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16},
    ),
    "deberta": ("DebertaForMaskedLM", "DebertaConfig", TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        TEXT | {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        TEXT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ | {"max_position_embeddings": 16}),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGE),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 16,
            "patch_size": 2,
            "num_channels": 1,
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [1, 2],
            "window_size": 4,
            "num_labels": CLASSES,
        },
    ),
    "clip_vision": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": IMAGE, "num_labels": CLASSES}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQ2SEQ | {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16},
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS | {"num_experts": 3}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TEXT
        | {
            "num_key_value_heads": 2,
            "moe_intermediate_size": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 6,
            "kv_lora_rank": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
        },
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 3, "time_step_rank": 2},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "state_size": 3,
            "num_heads": 4,
            "head_dim": 4,
            "n_groups": 1,
            "chunk_size": 4,
        },
    ),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET | {"layer_type": "basic", "hidden_act": "gelu"}),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"num_channels": 1, "hidden_sizes": [4, 6], "depths": [1, 2], "num_stages": 2, "patch_size": 2, "num_labels": CLASSES},
    ),
}


def family(name: str, **options: Any) -> nn.Module:
    """A tiny model of a Hugging Face family."""
    model, config, defaults = FAMILIES[name]
    built = hugging_face(model, config, **{**defaults, **options})
    if getattr(built.config, "_experts_implementation", None) is not None:
        built.config._experts_implementation = "eager"  # grouped products know no float64
    return built
