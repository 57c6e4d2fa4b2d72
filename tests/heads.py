"""Heads of Hugging Face for every task, batches of any size and length for them, and the targets their own losses see."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases import CLASSES, VOCABULARY, causal_batch, classified_text_batch, image_batch, masked_batch, seq2seq_batch
from tests.families import FAMILIES, TEXT, family, hugging_face

Batch = dict[str, Tensor]
Draw = Callable[[int, int, torch.Generator], Any]  # of a size and a length


@dataclass(frozen=True)
class Head:
    """A model, its batches, the likelihood of its loss, and whether positions predict the next label."""

    build: Callable[[], nn.Module]
    batch: Draw
    kind: str = "categorical"
    shifted: bool = False


def bert(head: str, **options: Any) -> nn.Module:
    return hugging_face(f"BertFor{head}", "BertConfig", **TEXT, **options)


def headed(name: str, head: str, **options: Any) -> nn.Module:
    """A family of `tests.cases` under another head."""
    _, config, defaults = FAMILIES[name]
    return hugging_face(head, config, **{**defaults, **options})


def text_with(draw: Draw) -> Draw:
    """Rows of different length with what is drawn in place of their labels."""

    def batch(size: int, length: int, generator: torch.Generator) -> Batch:
        found = causal_batch(size, length, generator)
        del found["labels"]
        return found | draw(size, length, generator)

    return batch


def image_with(draw: Draw) -> Draw:
    return lambda size, length, generator: image_batch(size, length, generator) | draw(size, length, generator)


def classes(*shape: int, count: int = CLASSES) -> Draw:
    """Labels of this shape behind the rows' axis."""
    return lambda size, _, generator: {"labels": torch.randint(count, (size, *shape), generator=generator)}


def ones_and_zeros(size: int, _: int, generator: torch.Generator) -> Batch:
    return {"labels": torch.randint(2, (size, CLASSES), generator=generator).double()}


def numbers(*shape: int) -> Draw:
    return lambda size, _, generator: {"labels": torch.randn(size, *shape, generator=generator, dtype=torch.float64)}


def partly_ignored(size: int, length: int, generator: torch.Generator) -> Batch:
    labels = torch.randint(CLASSES, (size, length), generator=generator)
    labels[0, 1] = labels[-1, 3:] = -100
    return {"labels": labels}


def spans(size: int, length: int, generator: torch.Generator) -> Batch:
    return {key: torch.randint(length, (size,), generator=generator) for key in ("start_positions", "end_positions")}


def choices(size: int, length: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(3, VOCABULARY, (size, 4, length), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(4, (size,), generator=generator)}


MULTI_LABEL = {"num_labels": CLASSES, "problem_type": "multi_label_classification"}
SEVERAL = {"num_labels": CLASSES, "problem_type": "regression"}

HEADS = {
    "gpt2": Head(lambda: family("gpt2"), causal_batch, shifted=True),
    "mistral": Head(lambda: family("mistral"), causal_batch, shifted=True),
    "mamba": Head(lambda: family("mamba"), causal_batch, shifted=True),
    "roberta": Head(lambda: family("roberta"), masked_batch),
    "distilbert": Head(lambda: family("distilbert"), masked_batch),
    "t5": Head(lambda: family("t5"), seq2seq_batch),
    "bart": Head(lambda: family("bart"), seq2seq_batch),
    "tokens": Head(
        lambda: headed("distilbert", "DistilBertForTokenClassification", num_labels=CLASSES), text_with(partly_ignored)
    ),
    "causal classifier": Head(
        lambda: headed("gpt2", "GPT2ForSequenceClassification", num_labels=CLASSES, pad_token_id=0), classified_text_batch
    ),
    "classifier": Head(
        lambda: headed("distilbert", "DistilBertForSequenceClassification", num_labels=CLASSES), classified_text_batch
    ),
    "column of classes": Head(lambda: bert("SequenceClassification", num_labels=CLASSES), text_with(classes(1))),
    "multi-label": Head(lambda: bert("SequenceClassification", **MULTI_LABEL), text_with(ones_and_zeros), "bernoulli"),
    "regression": Head(lambda: bert("SequenceClassification", num_labels=1), text_with(numbers()), "gaussian"),
    "regression of counts": Head(lambda: bert("SequenceClassification", num_labels=1), text_with(classes(count=7)), "gaussian"),
    "regression of several": Head(lambda: bert("SequenceClassification", **SEVERAL), text_with(numbers(CLASSES)), "gaussian"),
    "vit": Head(lambda: family("vit"), image_batch),
    "vit multi-label": Head(lambda: family("vit", **MULTI_LABEL), image_with(ones_and_zeros), "bernoulli"),
    "vit regression": Head(lambda: family("vit", **SEVERAL), image_with(numbers(CLASSES)), "gaussian"),
    "resnet": Head(lambda: family("resnet"), image_batch),
    "convnext": Head(lambda: family("convnext"), image_batch),
    "questions": Head(lambda: bert("QuestionAnswering"), text_with(spans)),
    "questions distilbert": Head(lambda: headed("distilbert", "DistilBertForQuestionAnswering"), text_with(spans)),
    "questions t5": Head(lambda: headed("t5", "T5ForQuestionAnswering"), text_with(spans)),
    "multiple choice": Head(lambda: bert("MultipleChoice"), choices),
}


def outputs_and_labels(model: nn.Module, batch: Batch, shifted: bool) -> tuple[Tensor, Tensor]:
    """Logits (N, M, C) and labels (N, M) or (N, M, C) of all targets, ignored ones marked by -100."""
    output = model(**batch)
    if "start_positions" in batch:
        positions = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
        return torch.stack([output.start_logits, output.end_logits], dim=1), positions
    logits, labels = output.logits, batch["labels"]
    if shifted:
        return logits[:, :-1], labels[:, 1:]
    if logits.ndim == 2:
        return logits[:, None], labels.reshape(len(labels), 1, -1) if labels.numel() == logits.numel() else labels.reshape(
            -1, 1
        )
    return logits, labels
