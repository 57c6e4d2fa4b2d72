"""Data, models and Trainers of the configurations of the Hugging Face Trainer."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
)

from tests.configurations.transformers_sessions import CLOCK
from tests.transformers_runs import VOCABULARY, Sentences, language_model


class Unpadded(Sentences):
    """Every row has as many labels, so that a mean over tokens is one over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = self.tokens.clone()


class Ragged(Sentences):
    """Rows of three to six tokens, and how long they are."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = 3 + index % 4
        return {"input_ids": self.tokens[index, :length], "labels": self.labels[index, :length]}


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows filled up to the longest."""
    filling = {"input_ids": 0, "labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=filling[name])
        for name in rows[0]
    }


class Augmented(Sentences):
    """Tokens replaced at random, from every global generator and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(9)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        noise = torch.rand(6) + torch.rand(6, generator=self.generator) + np.random.rand() + random.random()
        return row | {"input_ids": row["input_ids"].masked_fill(noise > 2.5, 0)}


class OneShot(IterableDataset[Any]):
    """A stream that goes by once: rows drawn as they are asked for, from a generator of its own."""

    def __init__(self, num_rows: int = 200) -> None:
        self.generator = torch.Generator().manual_seed(4)
        self.rows = self._stream(num_rows)

    def _stream(self, num_rows: int) -> Iterator[dict[str, Tensor]]:
        for _ in range(num_rows):
            tokens = torch.randint(1, VOCABULARY, (6,), generator=self.generator)
            yield {"input_ids": tokens, "labels": tokens}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.rows


class Texts(Dataset[Any]):
    """Token rows as a tokenizer gives them."""

    def __init__(self) -> None:
        self.tokens = Sentences().tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.tokens[index].tolist()}


class Images(Dataset[Any]):
    """Squares of noise in three classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(24, 1, 16, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": index % 3}


def masking_collator() -> DataCollatorForLanguageModeling:
    """Transformers' own, which keeps a generator."""
    special = {"pad_token": "0", "mask_token": "1", "unk_token": "2"}
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="2"))
    return DataCollatorForLanguageModeling(
        PreTrainedTokenizerFast(tokenizer_object=words, **special), mlm_probability=0.5, seed=5
    )


def mask_filler() -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **sizes))


def adapted_model() -> nn.Module:
    adapters = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=0.1, task_type="CAUSAL_LM")
    return get_peft_model(language_model(), adapters)


class Checkpointed(nn.Module):
    """Checkpointing by a model itself, in evaluation mode too."""

    def __init__(self, inner: nn.Module, *, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(self.inner, hidden, use_reentrant=self.use_reentrant)


def checkpointed_model(*, use_reentrant: bool) -> nn.Module:
    model = language_model()
    model.transformer.h[0].mlp = Checkpointed(model.transformer.h[0].mlp, use_reentrant=use_reentrant)
    return model


def partly_compiled_model() -> nn.Module:
    model = language_model()
    model.transformer.h[0].mlp.compile(backend="aot_eager")
    return model


def half_frozen() -> nn.Module:
    model = language_model(n_layer=2)
    model.transformer.h[0].requires_grad_(False)
    return model


def image_classifier() -> nn.Module:
    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_labels=3, **sizes))


def bfloat16_model() -> nn.Module:
    return language_model().to(torch.bfloat16)


def half_model() -> nn.Module:
    return language_model().to(torch.float16)


def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own that needs logits and labels."""
    surprise = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    losses = (1 - (-surprise).exp()) ** 2 * surprise
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def collecting_focal() -> dict[str, Any]:
    """The same, remembering every value and drawing noise of its own."""
    values: list[float] = []
    generator = torch.Generator().manual_seed(6)

    def compute_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = focal(outputs, labels, num_items_in_batch) * (1 + 0.1 * torch.rand((), generator=generator))
        values.append(loss.item())
        return loss

    compute_loss_func.values = values  # type: ignore[attr-defined]
    compute_loss_func.generator = generator  # type: ignore[attr-defined]
    return {"compute_loss_func": compute_loss_func}


def collected(trainer: Trainer) -> Any:
    function: Any = trainer.compute_loss_func
    return [list(function.values), function.generator.get_state()]


class Meter:
    """A running mean as users write them."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def update(self, value: Tensor) -> None:
        self.total += value.detach()
        self.count += 1


class PenalisedTrainer(Trainer):
    """Its own `compute_loss`, which logs, collects, counts and draws."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, list[float]] = {"penalty": []}
        self.meter = Meter()
        self.generator = torch.Generator().manual_seed(8)
        self.calls = 0
        self.largest = torch.zeros(())

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        of_labels = outputs.logits[:, :-1][labels[:, 1:] != -100]
        penalty = of_labels.square().mean() * torch.rand((), generator=self.generator)
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) + 0.01 * penalty
        self._metrics["penalty"].append(penalty.item())
        self.meter.update(penalty)
        self.calls += 1
        self.largest.clamp_(min=penalty.item())
        self.log({"penalty": penalty.item(), "noise": torch.rand(()).item(), "calls": float(self.calls)})
        return (loss, outputs) if return_outputs else loss


def penalties(trainer: Any) -> Any:
    return [trainer._metrics, trainer.meter.total, trainer.meter.count, trainer.calls, trainer.largest]


class ScalingTrainer(Trainer):
    """Mixed precision in float16 with a gradient scaler, which a CPU has to be forced to."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=2)


class ExhaustedTrainer(Trainer):
    """Runs out of memory for more than two rows."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().training_step(model, inputs, num_items_in_batch)


def several_evaluations() -> dict[str, Any]:
    evaluated = Sentences(8)
    return {"eval_dataset": {"first": evaluated, "second": Sentences(6)}, "compute_metrics": right_tokens}


def right_tokens(prediction: Any) -> dict[str, float]:
    return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def stepped() -> dict[str, Any]:
    """An optimizer class of the user's own."""
    return {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})}


def scalars(trainer: Trainer) -> Any:
    """What TensorBoard has of training."""
    [file] = Path(trainer.args.output_dir or "").rglob("events.out.*")
    accumulator = EventAccumulator(str(file))
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if tag.startswith("train/") and not tag.endswith(CLOCK)]
    assert "train/loss" in tags
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}
