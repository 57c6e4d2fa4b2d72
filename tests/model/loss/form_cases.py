"""Models whose own loss has a standard form, and one whose has none, with batches of any size."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases import CLASSES, VOCABULARY, causal_batch, masked_batch
from tests.families import TEXT, family, hugging_face

LENGTH = 6


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def bert(head: str, **options: Any) -> nn.Module:
    return hugging_face(f"BertFor{head}", "BertConfig", **TEXT, **options)


def with_labels(labels: Callable[[int], dict[str, Tensor]]) -> Callable[[int], dict[str, Tensor]]:
    def build(size: int) -> dict[str, Tensor]:
        batch = causal_batch(size, LENGTH, generator())
        del batch["labels"]
        return {**batch, **labels(size)}

    return build


# name: (model, batch of a given size, valid targets of the batch, whether losses of single rows are known)
FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]], Callable[[Any], int], bool]] = {
    "causal": (
        lambda: family("llama"),
        lambda size: causal_batch(size, LENGTH, generator()),
        lambda batch: int((batch["labels"][:, 1:] != -100).sum()),
        True,
    ),
    "causal_bert": (
        lambda: hugging_face("BertLMHeadModel", "BertConfig", **TEXT, is_decoder=True),
        lambda size: causal_batch(size, LENGTH, generator()),
        lambda batch: int((batch["labels"][:, 1:] != -100).sum()),
        True,
    ),
    "masked": (
        lambda: bert("MaskedLM"),
        lambda size: masked_batch(size, LENGTH, generator()),
        lambda batch: int((batch["labels"] != -100).sum()),
        True,
    ),
    "token_classification": (
        lambda: bert("TokenClassification", num_labels=CLASSES),
        with_labels(lambda size: {"labels": torch.randint(CLASSES, (size, LENGTH), generator=generator())}),
        lambda batch: batch["labels"].numel(),
        True,
    ),
    "seq2seq": (
        lambda: family("bart", max_position_embeddings=16),
        lambda size: causal_batch(size, LENGTH, generator()),
        lambda batch: int((batch["labels"] != -100).sum()),
        True,
    ),
    "classification": (
        lambda: bert("SequenceClassification", num_labels=CLASSES),
        with_labels(lambda size: {"labels": torch.randint(CLASSES, (size,), generator=generator())}),
        lambda batch: len(batch["labels"]),
        True,
    ),
    "regression": (
        lambda: bert("SequenceClassification", num_labels=1),
        with_labels(lambda size: {"labels": torch.randn(size, generator=generator())}),
        lambda batch: len(batch["labels"]),
        True,
    ),
    "regression_of_several": (
        lambda: bert("SequenceClassification", num_labels=CLASSES, problem_type="regression"),
        with_labels(lambda size: {"labels": torch.randn(size, CLASSES, generator=generator())}),
        lambda batch: len(batch["labels"]),
        True,
    ),
    "multi_label": (
        lambda: bert("SequenceClassification", num_labels=CLASSES, problem_type="multi_label_classification"),
        with_labels(lambda size: {"labels": torch.randint(2, (size, CLASSES), generator=generator()).float()}),
        lambda batch: len(batch["labels"]),
        True,
    ),
    "question_answering": (
        lambda: bert("QuestionAnswering"),
        with_labels(
            lambda size: {
                "start_positions": torch.randint(LENGTH, (size,), generator=generator()),
                "end_positions": torch.randint(LENGTH, (size,), generator=generator()),
            }
        ),
        lambda batch: 2 * len(batch["start_positions"]),
        True,
    ),
    "multiple_choice": (
        lambda: bert("MultipleChoice"),
        lambda size: {
            "input_ids": torch.randint(3, VOCABULARY, (size, 4, LENGTH), generator=generator()),
            "labels": torch.randint(4, (size,), generator=generator()),
        },
        lambda batch: len(batch["labels"]),
        True,
    ),
}
