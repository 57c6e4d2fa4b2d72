"""Every configuration of the Hugging Face Trainer in which training must be the same bits with and without the callback."""

import dataclasses
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
    TrainerCallback,
    TrainingArguments,
)

from curvature_callbacks import AtSteps, LossSpike, Measurement
from curvature_callbacks.transformers.callback import CurvatureCallback
from tests.training_cases import (
    Run,
    Stream,
    assert_probed,
    assert_same_training,
    callback_options,
    cheap,
    global_generators,
    seed_everything,
)
from tests.transformers_runs import VOCABULARY, MaskingCollator, Sentences, language_model, training_arguments, training_rows


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        title: for a table of documentation.
        changes: of `TrainingArguments`.
        model, data, collator: make a fresh one each.
        trainer: the class.
        arguments: more keyword arguments of the Trainer, made afresh.
        callback: options of the callback.
        steps: at which a probe must have succeeded.
        has_likelihood: whether the loss measured has one, so that `wide()` can be measured too.
        times: how often `train()` is called.
        interrupted: the step after which training stops and goes on from its checkpoint in a new Trainer.
        observed: what else a user could see change, of a Trainer after training.
        tolerated: beginning of a warning that this configuration gives without a callback too.
        is_slow: whether it takes seconds rather than tenths of one.
    """

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = language_model
    data: Callable[[], Any] = Sentences
    collator: Callable[[], Any] | None = None
    trainer: type[Trainer] = Trainer
    arguments: Callable[[], dict[str, Any]] = dict
    callback: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[int] = (0, 2, 4)
    has_likelihood: bool = True
    times: int = 1
    interrupted: int | None = None
    observed: Callable[[Trainer], Any] = lambda trainer: None
    tolerated: str | None = None
    is_slow: bool = False


def assert_same_bits(case: Case, directory: Any, measure: Sequence[Measurement] | None = None) -> None:
    """Train with and without the callback; raise an `AssertionError` where anything differs or was not measured."""
    measurements = cheap() if measure is None else list(measure)
    with warnings.catch_warnings():
        if case.tolerated:
            warnings.filterwarnings("ignore", message=case.tolerated)
        plain = run(case, Path(directory) / "plain")
        probing = CurvatureCallback(**callback_options(measure=measurements, **case.callback))
        probed = run(case, Path(directory) / "probed", probing)
        assert_same_training(plain, probed)
        assert_probed(probing.history, case.steps, {"probe", *(one.name for one in measurements)})
        if case.interrupted is not None:
            whole = run(dataclasses.replace(case, interrupted=None), Path(directory) / "whole")
            whole.logged, plain.logged = without_summary(whole.logged), without_summary(plain.logged)
            assert_same_training(whole, plain)


def run(case: Case, directory: Path, callback: CurvatureCallback | None = None) -> Run:
    """Train as `case` says and take down everything that must not depend on the callback."""
    seed_everything()
    callbacks: list[TrainerCallback] = [callback] if callback else []
    resumed = None
    if case.interrupted is not None:
        first = trainer_of(case, directory, [*callbacks, StopAfter(case.interrupted)], save_steps=case.interrupted)
        first.train()
        resumed = str(directory / f"checkpoint-{case.interrupted}")
        seed_everything(2)  # what the generators hold now must come from the checkpoint
    trainer = trainer_of(case, directory, callbacks)
    for _ in range(case.times):
        trainer.train(resume_from_checkpoint=resumed)
    assert trainer.optimizer is not None
    assert trainer.model is not None
    scaler = trainer.accelerator.scaler
    return Run(
        state=dict(trainer.model.state_dict()) | {"training": [child.training for child in trainer.model.modules()]},
        optimizers=[trainer.optimizer.state_dict(), scaler and scaler.state_dict()],
        logged=[training_rows(trainer.state.log_history), case.observed(trainer)],
        generators=[*global_generators(), *own_generators(trainer)],
        records=list(callback.history) if callback else [],
    )


def trainer_of(case: Case, directory: Path, callbacks: list[TrainerCallback], **changes: Any) -> Trainer:
    saving = {"save_strategy": "steps"} if changes else {}
    return case.trainer(
        model=case.model(),
        args=training_arguments(directory, **(dict(case.changes) | saving | changes)),
        train_dataset=case.data(),
        data_collator=case.collator() if case.collator else None,
        callbacks=callbacks,
        **case.arguments(),
    )


def own_generators(trainer: Trainer) -> list[Any]:
    """States of the generators that collator, data set or Trainer hold."""
    held = [value for owner in (trainer.data_collator, trainer.train_dataset, trainer) for value in vars_of(owner)]
    torches = [value.get_state() for value in held if isinstance(value, torch.Generator)]
    numpys = [value.bit_generator.state for value in held if isinstance(value, np.random.Generator)]
    return [*torches, *numpys, *(value.getstate() for value in held if isinstance(value, random.Random))]


def vars_of(owner: Any) -> list[Any]:
    return list(getattr(owner, "__dict__", {}).values())


def without_summary(logged: list[Any]) -> list[Any]:
    """The row at the end averages over the steps since training was started or resumed; a checkpoint sorts the keys."""
    rows, observed = logged
    return [[dict(sorted(row.items())) for row in rows if "train_loss" not in row], observed]


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


# ------------------------------------------------------------------------------------------------------------------ data


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


# ---------------------------------------------------------------------------------------------------------------- models


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


# --------------------------------------------------------------------------------------------------------------- losses


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
        penalty = outputs.logits.square().mean() * torch.rand((), generator=self.generator)
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


CLOCK = ("runtime", "per_second")

# ----------------------------------------------------------------------------------------------------------------- table

_NAMES = {one.name for one in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"
BY_LENGTH = {"train_sampling_strategy": "group_by_length"} if "train_sampling_strategy" in _NAMES else {"group_by_length": True}
OF_THE_TRAINER = {"loss_fn": "trainer"}
WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
AFTER_ONE = (1, 2, 4)  # of a stream no batch has gone by before the first step
IN_PEFT = "`is_gradient_checkpointing` is deprecated"
IN_DYNAMO = "The .grad attribute of a Tensor that is not a leaf"


def checkpointing(*, use_reentrant: bool) -> dict[str, Any]:
    return {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}


def compiled(backend: str) -> Case:
    changes = {"torch_compile": True, "torch_compile_backend": backend, "max_steps": 3}
    return Case(f"`torch_compile` ({backend})", changes, steps=(0, 2), tolerated=IN_DYNAMO, is_slow=True)


CASES: dict[str, Case] = {
    "plain": Case("AdamW in float32, `report_to='none'`"),
    "accumulation": Case("gradient accumulation", {"gradient_accumulation_steps": 2}),
    "bf16": Case("mixed precision in bfloat16", {"bf16": True}),
    "fp16 flag": Case("`fp16` on a CPU, which the Trainer runs in float32", {"fp16": True}),
    "fp16 scaler": Case(
        "mixed precision in float16 with a gradient scaler, forced on a CPU", {"fp16": True}, trainer=ScalingTrainer
    ),
    "fp16 weights": Case("weights in float16", {"max_grad_norm": 0.5}, model=half_model),
    "bf16 weights": Case("weights in bfloat16", model=bfloat16_model),
    "clipping": Case("gradient clipping", {"max_grad_norm": 0.1}),
    "adafactor": Case("Adafactor", {"optim": "adafactor"}),
    "sgd": Case("SGD with momentum by `optimizer_cls_and_kwargs`", arguments=stepped),
    "schedule": Case("warm-up and a cosine schedule", {"warmup_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1}),
    "neftune": Case("NEFTune noise on the embeddings", {"neftune_noise_alpha": 5.0}),
    "label smoothing": Case("label smoothing, the model's own loss measured", {"label_smoothing_factor": 0.1}),
    "label smoothing measured": Case(
        "label smoothing, measured with it", {"label_smoothing_factor": 0.1}, callback=OF_THE_TRAINER
    ),
    "compute_loss_func": Case(
        "`compute_loss_func`, the model's own loss measured", arguments=collecting_focal, data=Unpadded, observed=collected
    ),
    "compute_loss_func measured": Case(
        "`compute_loss_func`, measured itself",
        arguments=collecting_focal,
        data=Unpadded,
        observed=collected,
        callback=OF_THE_TRAINER,
        has_likelihood=False,
    ),
    "compute_loss": Case(
        "a Trainer with its own `compute_loss`, the model's own loss measured",
        trainer=PenalisedTrainer,
        data=Unpadded,
        observed=penalties,
    ),
    "compute_loss measured": Case(
        "a Trainer with its own `compute_loss`, measured itself",
        trainer=PenalisedTrainer,
        data=Unpadded,
        observed=penalties,
        callback=OF_THE_TRAINER,
        has_likelihood=False,
    ),
    "compiled, eager": compiled("eager"),
    "compiled, aot_eager": compiled("aot_eager"),
    "checkpointing": Case("activation checkpointing without reentry", checkpointing(use_reentrant=False)),
    "checkpointing, reentrant": Case("activation checkpointing, reentrant", checkpointing(use_reentrant=True)),
    "model's own checkpointing": Case(
        "`torch.utils.checkpoint` called by the model", model=partial(checkpointed_model, use_reentrant=False)
    ),
    "model's own checkpointing, reentrant": Case(
        "`torch.utils.checkpoint` called by the model, reentrant", model=partial(checkpointed_model, use_reentrant=True)
    ),
    "compiled in place": Case("a submodule compiled in place", model=partly_compiled_model, tolerated=IN_DYNAMO),
    "augmentation": Case("data augmented from the global generators", data=Augmented),
    "grouped by length": Case("batches grouped by length", BY_LENGTH, data=Ragged, collator=lambda: padded),
    "workers": Case(
        "persistent workers and a collator with generators of its own",
        WORKERS | {"max_steps": 8},
        collator=MaskingCollator,
        steps=(0, 2, 4, 6, 8),
    ),
    "masking collator": Case(
        "`DataCollatorForLanguageModeling(seed=...)`", data=Texts, collator=masking_collator, model=mask_filler
    ),
    "own generator": Case("a collator with generators of its own", collator=MaskingCollator),
    "listed steps": Case(
        "listed steps, sequences cut",
        callback={"every_n_steps": 200, "schedule": AtSteps(steps=[0, 3]), "max_sequence_length": 4},
        steps=(0, 3),
    ),
    "spike": Case(
        "a probe when the loss leaves its range",
        callback={"every_n_steps": 200, "spike": LossSpike(num_std=0.1, window=2, cooldown=5)},
        steps=(0, 4),
    ),
    "other data": Case("measured on data of one's own", callback={"probe_dataset": Sentences(9)}),
    "limits": Case("seconds of a probe", callback={"max_seconds": 100.0}),
    "stream": Case("an `IterableDataset`", data=lambda: Stream(Sentences()), steps=AFTER_ONE),
    "stream, workers": Case(
        "an `IterableDataset` read by a persistent worker",
        WORKERS | {"max_steps": 8},
        data=lambda: Stream(Sentences()),
        steps=(1, 2, 4, 6, 8),
    ),
    "one-shot stream": Case("a stream that can be read once", data=OneShot, steps=AFTER_ONE),
    "smoothed stream": Case(
        "a stream with label smoothing, the model's own loss measured",
        {"label_smoothing_factor": 0.1},
        data=lambda: Stream(Sentences()),
        steps=AFTER_ONE,
    ),
    "smoothed stream measured": Case(
        "a stream with label smoothing, measured with it",
        {"label_smoothing_factor": 0.1},
        data=lambda: Stream(Sentences()),
        steps=AFTER_ONE,
        callback=OF_THE_TRAINER,
    ),
    "compute_loss on a stream": Case(
        "a stream and a Trainer with its own `compute_loss`, the model's own loss measured",
        trainer=PenalisedTrainer,
        data=OneShot,
        observed=penalties,
        steps=AFTER_ONE,
    ),
    "compute_loss on a stream, measured": Case(
        "a stream and a Trainer with its own `compute_loss`, measured itself",
        trainer=PenalisedTrainer,
        data=OneShot,
        observed=penalties,
        steps=AFTER_ONE,
        callback=OF_THE_TRAINER,
        has_likelihood=False,
    ),
    "lora": Case("PEFT: LoRA adapters", model=adapted_model, tolerated=IN_PEFT),
    "lora, label smoothing": Case(
        "PEFT: LoRA adapters with label smoothing, measured with it",
        {"label_smoothing_factor": 0.1},
        model=adapted_model,
        tolerated=IN_PEFT,
        callback=OF_THE_TRAINER,
    ),
    "lora, checkpointing": Case(
        "PEFT: LoRA adapters with activation checkpointing",
        checkpointing(use_reentrant=False),
        model=adapted_model,
        tolerated=IN_PEFT,
    ),
    "frozen": Case("frozen layers", model=half_frozen),
    "batch norm": Case("a model with BatchNorm", data=Images, model=image_classifier),
    "batch size found": Case(
        "`auto_find_batch_size` after running out of memory",
        {"auto_find_batch_size": True},
        trainer=ExhaustedTrainer,
        steps=(0, 0, 0, 2, 4),
    ),
    "tensorboard": Case("`report_to='tensorboard'`", {"report_to": "tensorboard"}, observed=scalars),
    "evaluation": Case(
        "several evaluation sets between steps",
        {"eval_strategy": "steps", "eval_steps": 2},
        arguments=several_evaluations,
    ),
    "best model": Case(
        "the best model loaded at the end",
        {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2},
        arguments=lambda: {"eval_dataset": Sentences(8)},
    ),
    "twice": Case("`train()` called twice", times=2, steps=(0, 2, 4, 0, 2, 4)),
    "resumed": Case("resuming from a checkpoint", {"max_steps": 7}, interrupted=3, steps=(0, 2, 4, 6)),
    "resumed stream": Case(
        "resuming a stream from a checkpoint",
        {"max_steps": 7},
        interrupted=3,
        data=lambda: Stream(Sentences()),
        steps=(1, 2, 4, 6),
    ),
}
