"""What a checkpoint of the Trainer holds of a callback: its state in JSON, and beside that a file with tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from curvature_callbacks.probes import stable_seed
from curvature_callbacks.transformers.frames import resumed_from

STATES: Final = "curvature_callbacks: "  # what our keys among the Trainer's callback states begin with


def tensor_file(args: TrainingArguments, state: TrainerState, key: str) -> Path:
    """Where the tensors of the state of this key are, in the checkpoint of this step."""
    folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    return folder / f"curvature_{stable_seed(0, key):08x}.pt"


def tensor_files(args: TrainingArguments, state: TrainerState, key: str, trainer: Trainer | None) -> list[Path]:
    """Where they may be in a resumed run, which may go on from another folder than its own."""
    path = tensor_file(args, state, key)
    folders = [resumed_from(trainer), args.resume_from_checkpoint]
    return [*(Path(folder) / path.name for folder in folders if isinstance(folder, str)), path]


def states_of_nobody(saved: Mapping[str, Any], trainer: Trainer | None) -> list[Any]:
    """Our states in a checkpoint that no callback of this run has the key of."""
    callbacks = trainer.callback_handler.callbacks if trainer is not None else []
    taken = {getattr(callback, "_state_key", None) for callback in callbacks}
    return [value for key, value in saved.items() if key.startswith(STATES) and key not in taken]
