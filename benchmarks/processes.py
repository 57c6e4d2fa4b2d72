"""What curvature costs over processes: products and Grams of two processes beside those of one, in gradients.

Every process has rows of its own and one thread. The unit is a gradient as training takes it: under DDP, its all-reduce
included, for two processes; a plain one for one. Medians of interleaved rounds in one run. With gloo on one machine an
exchange is a copy through memory: the figures say what the method moves, not what a network would take.

    python benchmarks/processes.py --out benchmarks/results/processes.json
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes import gathering as on_use
from curvature_callbacks.processes.group import current_world

ROWS, TOKENS = 8, 64
KINDS = ("ddp", "fsdp2, whole parameters", "fsdp2, on use")


def language_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 5000, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": TOKENS}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def sharded(model: Any) -> nn.Module:
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


def gradient(model: nn.Module, batch: Any) -> Callable[[], None]:
    """One of training: with the reduction of its wrapper."""

    def run() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def measured(kind: str, batch: Any, rounds: int) -> dict[str, float]:
    """Seconds of one row of the table."""
    world = current_world()
    bare = language_model()
    wrapped = DistributedDataParallel(language_model()) if world.size > 1 else language_model()
    model = bare if kind == "ddp" else sharded(bare)
    on_use.device_budget = (lambda device: 0) if kind.endswith("on use") else (lambda device: 1 << 40)
    memory = ProbeMemory()
    step = gradient(wrapped, batch)

    def problem() -> Problem:
        return Problem(model, [batch], memory=memory, world=world)

    with isolated(model, seed=0):
        hessian, ggn = problem().hessian(), problem().ggn()
        v = torch.randn(hessian.shape[0], 1, generator=torch.Generator().manual_seed(world.rank))
        tasks: dict[str, Callable[[], Any]] = {
            "gradient": step,
            "hessian product": lambda: hessian.matmat(v),
            "ggn product": lambda: ggn.matmat(v),
            "fisher gram": lambda: problem().grams(),
        }
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for number in range(rounds + 1):
            for name, task in tasks.items():
                start = time.perf_counter()
                task()
                if number:  # the first round certifies
                    seconds[name].append(world.average(time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in seconds.items()}


def work(rank: int, size: int, store: str, rounds: int, out: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(5000, (ROWS, TOKENS), generator=generator)
    found = {kind: measured(kind, {"input_ids": ids, "labels": ids}, rounds) for kind in (KINDS if size > 1 else KINDS[:1])}
    if rank == 0:
        out.update({f"{size} processes, {kind}" if size > 1 else "1 process": row for kind, row in found.items()})
    if size > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        seconds = manager.dict()
        for size in (1, 2):
            mp.spawn(work, args=(size, f"{folder}/{size}", options.rounds, seconds), nprocs=size)
        rows = dict(seconds)
    ratios = {
        name: {task: value / row["gradient"] for task, value in row.items() if task != "gradient"} for name, row in rows.items()
    }
    for name, row in ratios.items():
        print(f"{name:36}", "  ".join(f"{task} {value:5.2f}" for task, value in row.items()))
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "rows": ROWS, "tokens": TOKENS}
    result = {"about": about, "gradients": ratios, "seconds": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
