"""Curvature of a small Llama that learns the Python documentation character by character with the Hugging Face Trainer.

python examples/transformers_char_lm.py
"""

import argparse
import os
import pydoc_data.topics
import time
from pathlib import Path

import torch
from _closing import cleared, print_closing
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from curvature_callbacks import EdgeRatio, FisherSpectrum, KFACCoverage, TopEigenpairs
from curvature_callbacks.transformers.callback import CurvatureCallback


class Windows(Dataset):
    """Consecutive windows of a long text, as a causal language model takes them."""

    def __init__(self, symbols: Tensor, length: int) -> None:
        self.windows = symbols[: len(symbols) // length * length].view(-1, length)  # (num_windows, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def python_documentation() -> tuple[Tensor, int]:
    """The text of Python's `help()` topics as symbol numbers, and how many different symbols it has."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def unigram_entropy(symbols: Tensor) -> float:
    """The loss, in nats, of a model that knows how frequent each symbol is and nothing else."""
    share = symbols.bincount() / len(symbols)
    return torch.special.entr(share).sum().item()


def small_llama(vocab_size: int, length: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logdir", type=Path, default=Path("runs/transformers_char_lm"))
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=40, help="optimizer steps between probes")
    return parser.parse_args()


def training_arguments(max_steps: int, logdir: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(logdir),
        max_steps=max_steps,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max_steps // 20,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=max(1, max_steps // 5),
        per_device_eval_batch_size=256,
        save_strategy="no",
        report_to=["tensorboard"],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


def main() -> None:
    options = parsed_options()
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # layers this small lose more to the second thread's waiting than they gain
    set_seed(0)
    logdir = cleared(options.logdir)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logdir)  # else <output_dir>/runs/<date>_<host>

    length = 32
    symbols, vocab_size = python_documentation()
    held_out = len(symbols) // 10
    curvature = CurvatureCallback(
        every_n_steps=options.every,
        measure=[FisherSpectrum(), TopEigenpairs(k=2, per_block=True, max_matvecs=16), EdgeRatio(), KFACCoverage()],
        num_microbatches=1,
        microbatch_size=12,
        draw="fixed",
    )
    trainer = Trainer(
        model=small_llama(vocab_size, length),
        args=training_arguments(options.max_steps, logdir),
        train_dataset=Windows(symbols[:-held_out], length),
        eval_dataset=Windows(symbols[-held_out:], length),
        callbacks=[curvature],  # the one line a training script needs
    )
    trainer.remove_callback(PrinterCallback)  # prints every log
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start

    loss = next(log["eval_loss"] for log in reversed(trainer.state.log_history) if "eval_loss" in log)
    print(f"held-out loss {loss:.2f} nats a character; unigram entropy of the text {unigram_entropy(symbols):.2f}")
    print_closing(curvature.history, training_seconds=seconds, logdir=logdir)


if __name__ == "__main__":
    main()
