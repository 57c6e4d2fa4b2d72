"""The models of Hugging Face that the callback is run with: a tiny one of every class, and rows of data for it."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from curvature_callbacks import (
    ConfigurationError,
    FisherSpectrum,
    KFACCoverage,
    KFACQuality,
    Measurement,
    Problem,
    Record,
    TopEigenpairs,
)
from curvature_callbacks.transformers.callback import CurvatureCallback
from tests.cases import (
    CLASSES,
    VOCABULARY,
    causal_batch,
    classified_text_batch,
    image_batch,
    in_general_position,
    masked_batch,
    seq2seq_batch,
)
from tests.families import GROUPED, IMAGE, SPEECH, TEXT, hugging_face
from tests.heads import Batch, Draw, bert, headed
from tests.training_cases import assert_equal, assert_same_training
from tests.transformers_runs import transformers_run

LENGTH: Final = 6
NUM_DRAWS: Final = 6  # of three rows, the longest of which is full and the shortest lacks two tokens
WATCH: Final[dict[str, Any]] = {"every_n_steps": 2, "num_microbatches": 1, "microbatch_size": 4}


@dataclass(frozen=True)
class ModelCase:
    """One class of model.

    Attributes:
        title: for a table of documentation.
        build: makes the model, randomly initialised.
        draw: rows of a size and a length.
        kind: how a row's targets are counted by the oracle: `causal`, `tokens` or `row`.
        likelihood: of the loss; None where it has none.
        refused: measurement to why it is the right answer that there is none.
        collator: of the Trainer.
        is_quick: whether it is among those that stand for the families.
    """

    title: str
    build: Callable[[], nn.Module]
    draw: Draw = causal_batch
    kind: str = "causal"
    likelihood: str | None = "categorical"
    refused: Mapping[str, str] = field(default_factory=dict)
    collator: Callable[[], Any] | None = None
    is_quick: bool = False

    def model(self) -> nn.Module:
        return in_general_position(self.build)

    def data(self) -> Dataset[Any]:
        return DrawnRows(self.draw)


class DrawnRows(Dataset[Any]):
    """Rows as dictionaries, padded to one length."""

    def __init__(self, draw: Draw) -> None:
        generator = torch.Generator().manual_seed(0)
        batches = [draw(3, LENGTH, generator) for _ in range(NUM_DRAWS)]
        self.columns = {key: _single(torch.cat([batch[key] for batch in batches])) for key in batches[0]}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Batch:
        return {key: column[index] for key, column in self.columns.items()}


def _single(column: Tensor) -> Tensor:
    return column.float() if column.is_floating_point() else column


def everything() -> list[Measurement]:
    return [
        FisherSpectrum(),
        TopEigenpairs(k=2, max_matvecs=6),
        TopEigenpairs(operator="ggn", k=2, which="LA", max_matvecs=6),
        TopEigenpairs(operator="kfac", k=2, which="LA"),
        KFACQuality(),
        KFACCoverage(),
    ]


NAMES: Final = {
    "empirical_fisher": "Fisher",
    "hessian": "Hessian",
    "ggn": "GGN",
    "kfac_empirical_expand_eigenpairs": "K-FAC",
    "kfac_empirical_expand": "K-FAC quality",
    "kfac_coverage": "K-FAC coverage",
}

_IN_WORDS: Final = {
    r"samples are coupled|have no gradients of their own": "the loss couples the rows of a batch",
    r"likelihood of the loss": "the likelihood of the loss is not known",
    r"no second derivative": "a kernel has no second derivative",
}


def check(case: ModelCase, directory: Any, measure: Sequence[Measurement] | None = None) -> dict[str, str]:
    """Operator to `yes`, or to why it is refused; an `AssertionError` where training differs or a probe fails otherwise."""
    measurements = everything() if measure is None else list(measure)
    directory = Path(directory)
    plain = _run(case, directory / "plain")
    found: dict[str, str] = {}
    records: list[Record] = []
    try:
        probed = _run(case, directory / "probed", measurements)
    except ConfigurationError:  # before step 1: of some of them, so each is asked by itself
        kept = []
        for number, one in enumerate(measurements):
            try:
                _run(case, directory / str(number), [one], max_steps=1)
                kept.append(one)
            except ConfigurationError as error:
                found[_operator(one.name)] = in_words(str(error))
        probed = _run(case, directory / "kept", kept)
    assert_same_training(plain, probed)
    records = probed.records
    assert [one.step for one in records if one.measurement == "probe"] == [0, 2]
    for one in measurements:
        if _operator(one.name) not in found:
            found[_operator(one.name)] = _answer(one.name, records)
    return {_operator(one.name): found[_operator(one.name)] for one in measurements}


def _run(case: ModelCase, directory: Path, measure: Sequence[Measurement] | None = None, **changes: Any) -> Any:
    callback = None if measure is None else CurvatureCallback(**WATCH, measure=list(measure))
    built: list[nn.Module] = []

    def model() -> nn.Module:
        built.append(case.model())
        return built[-1]

    parts = {"model": model, "data": case.data, "collator": case.collator}
    run = transformers_run(directory, callback, **parts, **({"max_steps": 3} | changes))
    implementations = [_implementations(one) for one in (case.model(), built[0])]
    assert_equal(*implementations, "configuration")
    return run


def _implementations(model: nn.Module) -> list[Any]:
    """Of attention and experts, wherever a configuration says so."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    kinds = ("_attn_implementation", "_experts_implementation")
    return [getattr(config, kind, None) for config in configs for kind in kinds]


def _operator(name: str) -> str:
    return NAMES.get(name, name)


def _answer(name: str, records: Sequence[Record]) -> str:
    mine = [one for one in records if one.measurement == name]
    failed = [one.error or "" for one in mine if one.failed]
    if not failed:
        assert {one.step for one in mine} == {0, 2}, name
        return "yes"
    assert {one.step for one in mine} == {0}, failed  # refused for good
    assert failed[0].startswith("RefusedError")
    return in_words(failed[0])


def in_words(error: str) -> str:
    """A refusal in few words."""
    found = [words for pattern, words in _IN_WORDS.items() if re.search(pattern, error)]
    assert found, f"not a refusal that is known: {error}"
    return found[0]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A measurement that keeps what the first probe saw."""

    seen: list[tuple[nn.Module, Batch]] = field(default_factory=list)
    name: str = "snapshot"

    def init(self, problem: Problem) -> None:
        return None

    def measure(self, problem: Problem, state: None) -> tuple[list[Record], None]:
        if not self.seen:
            self.seen.append((copy.deepcopy(problem.model), copy.deepcopy(problem.microbatches[0].content)))
        return [Record(step=problem.step, measurement=self.name, scalars={"one": 1.0})], None


def first_probe(
    case: ModelCase, directory: Any, measure: Sequence[Measurement]
) -> tuple[nn.Module, Batch, dict[tuple[str, str | None], Record]]:
    """The model and batch of the probe before the first step, and its records by measurement and block."""
    snapshot = Snapshot()
    run = _run(case, Path(directory), [*measure, snapshot], max_steps=1)
    return *snapshot.seen[0], {(one.measurement, one.block): one for one in run.records if one.step == 0}


def speech_batch(size: int, length: int, generator: torch.Generator, *, samples: int = 60) -> Batch:
    """Sound and what is said, in texts of different length."""
    labels = torch.randint(3, VOCABULARY, (size, 4), generator=generator)
    labels[torch.arange(4) >= 4 - torch.arange(size)[:, None] % 3] = -100
    return {"input_values": torch.randn(size, samples, generator=generator), "labels": labels}


def classified_speech_batch(size: int, length: int, generator: torch.Generator) -> Batch:
    batch = speech_batch(size, length, generator)
    return batch | {"labels": torch.randint(CLASSES, (size,), generator=generator)}


def whisper_batch(size: int, length: int, generator: torch.Generator) -> Batch:
    features = torch.randn(size, 4, 16, generator=generator)
    return {"input_features": features, "labels": causal_batch(size, length, generator)["labels"]}


def large_image_batch(size: int, length: int, generator: torch.Generator) -> Batch:
    return image_batch(size, length, generator, side=16)


def captioned_batch(size: int, length: int, generator: torch.Generator) -> Batch:
    text = causal_batch(size, length, generator)
    text["input_ids"][:, -1] = 2  # the end, whose state is pooled
    pixels = torch.randn(size, 1, 8, 8, generator=generator)
    return {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"], "pixel_values": pixels}


def contrastive(rows: list[Batch]) -> dict[str, Any]:
    """As users collate for CLIP: the model is told to return its loss."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | {"return_loss": True}


def experts(name: str, **options: Any) -> nn.Module:
    """With the implementation of experts that is the default, where `tests.cases.family` takes the slow one.

    Its grouped products want rows of a multiple of 16 bytes.
    """
    heads = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}
    return headed(name, heads[name], **({"moe_intermediate_size": 8} | options if name == "qwen3_moe" else options))


def clip() -> nn.Module:
    text = TEXT | {"projection_dim": 8}
    vision = {key: value for key, value in IMAGE.items() if key != "num_labels"} | {"projection_dim": 8}
    return hugging_face("CLIPModel", "CLIPConfig", text_config=text, vision_config=vision, projection_dim=8)


MASKS = {"mask_time_prob": 0.3, "mask_time_length": 2, "mask_feature_prob": 0.0}


def speech(head: str, **options: Any) -> nn.Module:
    return hugging_face(f"Wav2Vec2For{head}", "Wav2Vec2Config", **(SPEECH | MASKS | {"pad_token_id": 0} | options))


ONCE = "a kernel has no second derivative"
COUPLED = "the loss couples the rows of a batch"
NO_LIKELIHOOD = "the likelihood of the loss is not known"
BY_BATCH = dict.fromkeys(("Fisher", "K-FAC", "K-FAC quality"), COUPLED) | {"GGN": NO_LIKELIHOOD}


def causal(title: str, name: str, head: str, **options: Any) -> ModelCase:
    quick = options.pop("is_quick", False)
    return ModelCase(title, lambda: headed(name, head, **options), is_quick=quick)


def masked(title: str, name: str, head: str, **options: Any) -> ModelCase:
    return ModelCase(title, lambda: headed(name, head, **options), masked_batch, "tokens")


def pictured(title: str, name: str, head: str, draw: Draw = image_batch, *, is_quick: bool = False) -> ModelCase:
    return ModelCase(title, lambda: headed(name, head), draw, "row", is_quick=is_quick)


CASES: dict[str, ModelCase] = {
    "gpt2": causal("GPT-2", "gpt2", "GPT2LMHeadModel"),
    "llama": causal("Llama (grouped queries)", "llama", "LlamaForCausalLM", is_quick=True),
    "qwen2": causal("Qwen2", "qwen2", "Qwen2ForCausalLM"),
    "qwen3": causal("Qwen3", "qwen3", "Qwen3ForCausalLM"),
    "mistral": causal("Mistral", "mistral", "MistralForCausalLM"),
    "gemma": causal("Gemma", "gemma", "GemmaForCausalLM"),
    "gemma2": causal("Gemma 2", "gemma2", "Gemma2ForCausalLM"),
    "gemma3": causal("Gemma 3 (text)", "gemma3", "Gemma3ForCausalLM"),
    "phi": causal("Phi", "phi", "PhiForCausalLM"),
    "phi3": causal("Phi-3", "phi3", "Phi3ForCausalLM"),
    "gpt_neox": causal("GPT-NeoX", "gpt_neox", "GPTNeoXForCausalLM"),
    "opt": causal("OPT", "opt", "OPTForCausalLM"),
    "mixtral": ModelCase("Mixtral (experts)", lambda: experts("mixtral"), is_quick=True),
    "mixtral, router loss": ModelCase(
        "Mixtral with `output_router_logits` (a loss that balances the experts)",
        lambda: experts("mixtral", output_router_logits=True),
        refused=BY_BATCH,
    ),
    "qwen3_moe": ModelCase("Qwen3-MoE (experts)", lambda: experts("qwen3_moe")),
    "qwen3_moe, router loss": ModelCase(
        "Qwen3-MoE with `output_router_logits` (a loss that balances the experts)",
        lambda: experts("qwen3_moe", output_router_logits=True),
        refused=BY_BATCH,
    ),
    "gpt_oss": ModelCase("GPT-OSS (experts, attention sinks)", lambda: experts("gpt_oss")),
    "mamba": causal("Mamba", "mamba", "MambaForCausalLM"),
    "mamba2": causal("Mamba-2", "mamba2", "Mamba2ForCausalLM"),
    "bert": masked("BERT, masked tokens", "bert", "BertForMaskedLM"),
    "bert classifier": ModelCase(
        "BERT, classes of texts",
        lambda: bert("SequenceClassification", num_labels=CLASSES),
        classified_text_batch,
        "row",
    ),
    "roberta": masked("RoBERTa, masked tokens", "roberta", "RobertaForMaskedLM"),
    "distilbert": masked("DistilBERT, masked tokens", "distilbert", "DistilBertForMaskedLM"),
    "deberta": masked("DeBERTa, masked tokens", "deberta", "DebertaForMaskedLM"),
    "deberta_v2": masked("DeBERTa-v2, masked tokens", "deberta_v2", "DebertaV2ForMaskedLM"),
    "modernbert": masked("ModernBERT, masked tokens", "modernbert", "ModernBertForMaskedLM"),
    "t5": ModelCase("T5", lambda: headed("t5", "T5ForConditionalGeneration"), seq2seq_batch, "tokens", is_quick=True),
    "bart": ModelCase("BART", lambda: headed("bart", "BartForConditionalGeneration"), seq2seq_batch, "tokens"),
    "whisper": ModelCase("Whisper", lambda: headed("whisper", "WhisperForConditionalGeneration"), whisper_batch, "tokens"),
    "vit": pictured("ViT", "vit", "ViTForImageClassification", is_quick=True),
    "dinov2": pictured("DINOv2, classes of images", "dinov2", "Dinov2ForImageClassification"),
    "swin": pictured("Swin", "swin", "SwinForImageClassification", large_image_batch),
    "convnext": pictured("ConvNeXt", "convnext", "ConvNextForImageClassification"),
    "resnet": pictured("ResNet", "resnet", "ResNetForImageClassification", is_quick=True),
    "clip classifier": pictured("CLIP, classes of images", "clip_vision", "CLIPForImageClassification"),
    "clip": ModelCase(
        "CLIP, contrastive",
        clip,
        captioned_batch,
        "row",
        likelihood=None,
        refused=BY_BATCH,
        collator=lambda: contrastive,
    ),
    "wav2vec2 classifier": ModelCase(
        "Wav2Vec2, classes of sounds",
        lambda: speech("SequenceClassification", num_labels=CLASSES, classifier_proj_size=8),
        classified_speech_batch,
        "row",
    ),
    "wav2vec2": ModelCase(
        "Wav2Vec2, CTC averaged over rows",
        lambda: speech("CTC", ctc_loss_reduction="mean"),
        speech_batch,
        "row",
        likelihood=None,
        refused={"GGN": NO_LIKELIHOOD, "Hessian": ONCE},
    ),
    "wav2vec2, summed": ModelCase(
        "Wav2Vec2, CTC summed over rows (its default)",
        lambda: speech("CTC", ctc_loss_reduction="sum"),
        speech_batch,
        "row",
        likelihood=None,
        refused={"GGN": NO_LIKELIHOOD, "Hessian": ONCE},
    ),
}
# GROUPED is what Llama and its kin are built of; a test of attention asks that they do share their keys.
assert GROUPED["num_key_value_heads"] < GROUPED["num_attention_heads"]
