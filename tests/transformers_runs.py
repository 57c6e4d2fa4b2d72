"""Data, models and Trainers of Hugging Face in the tests, and runs of them to compare."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from tests.training_cases import ROWS, Run, checksum, digest, global_generators, seed_everything

VOCABULARY = 17


class Sentences(Dataset[Any]):
    """Token rows with padding ignored in the labels."""

    def __init__(self, num_rows: int = ROWS, *, labels: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, VOCABULARY, (num_rows, 6), generator=generator)
        self.labels = self.tokens.clone()
        self.labels[::3, 4:] = -100
        self.with_labels = labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.tokens[index]}
        return row | {"labels": self.labels[index]} if self.with_labels else row


class MaskingCollator:
    """Replaces tokens at random from generators of its own, as `DataCollatorForLanguageModeling(seed=...)` does."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None
        self.numpy = np.random.default_rng(5)

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(5)
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        shape = batch["input_ids"].shape
        masked = torch.rand(shape, generator=self.generator) < 0.2
        masked |= torch.from_numpy(self.numpy.random(shape) < 0.2)
        return batch | {"input_ids": batch["input_ids"].masked_fill(masked, 0)}


def language_model(**changes: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**(sizes | {"bos_token_id": 0, "eos_token_id": 0} | changes)))


def training_arguments(directory: Any, **changes: Any) -> TrainingArguments:
    fixed = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 7}
    quiet = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "report_to": "none"}
    return TrainingArguments(output_dir=str(directory), **(fixed | quiet | changes))


class Log(TrainerCallback):
    """A small reporter: what `on_log` brings, and a digest of the parameters after every step."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.digests: dict[int, str] = {}
        self.checksums: dict[int, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.digests[state.global_step] = digest(kwargs["model"])
        self.checksums[state.global_step] = checksum(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.append((state.global_step, dict(kwargs["logs"])))


_CLOCK = ("runtime", "per_second")


def training_rows(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`log_history` without the callback's rows and without wall-clock values."""
    rows = [row for row in history if not any(key.startswith("curvature") for key in row)]
    return [{key: value for key, value in row.items() if not key.endswith(_CLOCK)} for row in rows]


def transformers_run(
    directory: Any,
    callback: Any = None,
    *,
    model: Callable[[], nn.Module] = language_model,
    data: Callable[[], Any] = Sentences,
    collator: Callable[[], Any] | None = None,
    resume: str | None = None,
    **changes: Any,
) -> Run:
    """Train from a fixed seed, or on from the checkpoint `resume`; with `callback`, its records are in the run."""
    seed_everything()
    trainer = Trainer(
        model=model(),
        args=training_arguments(directory, **changes),
        train_dataset=data(),
        data_collator=collator() if collator else None,
        callbacks=[callback] if callback else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.optimizer is not None
    return Run(
        state=dict(trainer.model.state_dict()) | {"training": [child.training for child in trainer.model.modules()]},
        optimizers=[trainer.optimizer.state_dict()],
        logged=training_rows(trainer.state.log_history),
        generators=global_generators(),
        records=list(callback.history) if callback else [],
    )
