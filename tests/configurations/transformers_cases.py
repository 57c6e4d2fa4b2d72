"""Every configuration of the Hugging Face Trainer in which training must be the same bits with and without the callback."""

import dataclasses
from functools import partial
from typing import Any

from transformers import TrainingArguments

from curvature_callbacks import AtSteps, LossSpike
from tests.configurations.transformers_parts import (
    Augmented,
    ExhaustedTrainer,
    Images,
    OneShot,
    PenalisedTrainer,
    Ragged,
    ScalingTrainer,
    Texts,
    Unpadded,
    adapted_model,
    bfloat16_model,
    checkpointed_model,
    collected,
    collecting_focal,
    half_frozen,
    half_model,
    image_classifier,
    mask_filler,
    masking_collator,
    padded,
    partly_compiled_model,
    penalties,
    scalars,
    several_evaluations,
    stepped,
)
from tests.configurations.transformers_sessions import Case
from tests.training_cases import Stream
from tests.transformers_runs import MaskingCollator, Sentences

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
    "label smoothing": Case("label smoothing, by default", {"label_smoothing_factor": 0.1}),
    "label smoothing measured": Case(
        "label smoothing, measured with it", {"label_smoothing_factor": 0.1}, callback=OF_THE_TRAINER
    ),
    "compute_loss_func": Case(
        "`compute_loss_func`, by default",
        arguments=collecting_focal,
        data=Unpadded,
        observed=collected,
        has_likelihood=False,
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
        "a Trainer with its own `compute_loss`, by default",
        trainer=PenalisedTrainer,
        data=Unpadded,
        observed=penalties,
        has_likelihood=False,
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
        "a stream with label smoothing, by default",
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
        "a stream and a Trainer with its own `compute_loss`, by default",
        trainer=PenalisedTrainer,
        data=OneShot,
        observed=penalties,
        steps=AFTER_ONE,
        has_likelihood=False,
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
