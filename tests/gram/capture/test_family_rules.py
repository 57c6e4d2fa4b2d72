"""Every parameter of every Hugging Face family: the oracle's Gram, nothing row by row but what is listed with its reason."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import (
    CASES,
    MORE_FAMILIES,
    SIZES,
    VOCABULARY,
    Case,
    causal_batch,
    image_batch,
    in_general_position,
    masked_batch,
    seq2seq_batch,
)
from tests.families import FAMILIES, family
from tests.gram.capture.rule_cases import assert_exact, assert_no_fallback, parameter_grams
from tests.reference import gradients_of, rows, sample_gradients

TOLERANCE = 1e-5  # norms, rotary embeddings and losses compute in float32 whatever the model's dtype

# family: {parameter: why it goes row by row}
EXCEPTIONS: dict[str, dict[str, str]] = {}

BATCHES = {"causal": causal_batch, "tokens": masked_batch, "seq2seq": seq2seq_batch, "row": image_batch}
OPTIONS = {"opt": {"activation_function": "gelu"}}


def windows(size: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    return image_batch(size, length, generator, side=16)


def spoken(size: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    features = torch.randn(size, 4, 16, generator=generator, dtype=torch.float64)
    return {"input_features": features, "labels": seq2seq_batch(size, length, generator)["labels"]}


def family_case(name: str) -> Case:
    if name == "whisper":
        return Case(name, "tokens", lambda: family(name), spoken)
    kind = MORE_FAMILIES[name] if name in MORE_FAMILIES else CASES[name].kind
    batch = {"swin": windows}.get(name) or (CASES[name].batch if name in CASES else BATCHES[kind])
    return Case(name, "tokens" if kind == "seq2seq" else kind, lambda: family(name, **OPTIONS.get(name, {})), batch)


def assert_family(model: nn.Module, microbatches: list[Any], truth: Mapping[str, Tensor], name: str, loss: Any = None) -> None:
    found = parameter_grams(model, microbatches, loss)
    assert_exact(found, truth, model, TOLERANCE)
    assert_no_fallback(found, EXCEPTIONS.get(name, {}))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "wav2vec2"])
def test_families(name: str):
    case = family_case(name)
    model, microbatches = case.model(), case.microbatches(SIZES)
    assert_family(model, microbatches, sample_gradients(model, microbatches, case.kind), name)


def ctc(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """One alignment loss a row (the model's own sums them over the batch)."""
    scores = model(batch["input_values"]).logits.log_softmax(-1).transpose(0, 1)
    lengths = [torch.full((scores.shape[1],), extent) for extent in (scores.shape[0], batch["labels"].shape[1])]
    return F.ctc_loss(scores, batch["labels"], *lengths, reduction="none")


def test_speech_under_an_alignment_loss():
    model = in_general_position(lambda: family("wav2vec2")).double()
    generator = torch.Generator().manual_seed(0)
    microbatches = [
        {
            "input_values": torch.randn(size, 41 + 4 * size, generator=generator, dtype=torch.float64),
            "labels": torch.randint(3, VOCABULARY, (size, 3), generator=generator),
        }
        for size in SIZES
    ]
    truth = gradients_of(model, [lambda m, row=row: ctc(m, row).sum() for row in rows(microbatches)])
    assert_family(model, microbatches, truth, "wav2vec2", ctc)


def test_exceptions_name_parameters_that_exist():
    for name, listed in EXCEPTIONS.items():
        assert set(listed) <= {parameter for parameter, _ in family_case(name).build().named_parameters()}, name
