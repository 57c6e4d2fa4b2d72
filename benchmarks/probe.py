"""What a probe costs, in gradients of the same rows: ratios inside one process, interleaved medians.

One gradient is one forward and one backward pass over the same microbatch with the kernels training uses. Every other row
runs as the callback runs it, isolation and graph building included. The certificate, spent on the first probe of a run,
is a row of its own. Peer: a plain loop over rows, the only other exact way that works on every model.

    python benchmarks/probe.py --out benchmarks/results/probe.json
"""

import argparse
import gc
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from fisher_work import Task, timed
from torch import nn

import curvature_callbacks as cc
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.problem import Problem


def language_model(device: torch.device, *, vocabulary: int, width: int, layers: int, N: int, T: int) -> tuple[Any, Any, None]:
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=4, n_positions=T, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval().to(device)
    ids = torch.randint(vocabulary, (N, T), device=device)
    return model, {"input_ids": ids, "labels": ids}, None


def perceptron(device: torch.device, *, width: int, N: int) -> tuple[Any, Any, str]:
    layers = [nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    batch = (torch.randn(N, 64, device=device), torch.randint(10, (N,), device=device))
    return nn.Sequential(*layers).to(device), batch, "cross_entropy"


def cases(device: torch.device) -> dict[str, tuple[Any, Any, Any]]:
    return {
        "GPT-2 tied, 4 layers, d=256, V=5000, N=8, T=128": language_model(
            device, vocabulary=5000, width=256, layers=4, N=8, T=128
        ),
        "GPT-2 tied, 4 layers, d=256, V=5000, N=32, T=64": language_model(
            device, vocabulary=5000, width=256, layers=4, N=32, T=64
        ),
        "GPT-2 tied, 4 layers, d=128, V=1000, N=64, T=32": language_model(
            device, vocabulary=1000, width=128, layers=4, N=64, T=32
        ),
        "MLP 3 x 512, N=256": perceptron(device, width=512, N=256),
    }


def tasks(model: nn.Module, batch: Any, loss: Any) -> dict[str, Task]:
    parameters = list(model.parameters())
    memory = ProbeMemory()

    def mean_loss(rows: Any = batch) -> torch.Tensor:
        return model(**rows).loss if loss is None else nn.functional.cross_entropy(model(rows[0]), rows[1])

    def gradient() -> None:
        torch.autograd.grad(mean_loss(), parameters)

    def grams(known: ProbeMemory) -> None:
        with isolated(model, seed=0):
            _ = Problem(model, [batch], loss=loss, memory=known).grams()

    def row_loop() -> None:
        size = len(batch["labels"]) if loss is None else len(batch[1])
        for i in range(size):
            one = {k: v[i : i + 1] for k, v in batch.items()} if loss is None else tuple(v[i : i + 1] for v in batch)
            torch.autograd.grad(mean_loss(one), parameters)

    def lanczos(steps: int) -> None:
        with isolated(model, seed=0):
            hessian = Problem(model, [batch], loss=loss).hessian()
            cc.lanczos(hessian, k=4, which="BE", tol=1e-12, max_matvecs=steps)

    grams(memory)
    return {
        "gradient": Task(gradient),
        "fisher_spectrum": Task(lambda: grams(memory)),
        "fisher_spectrum_with_certificate": Task(lambda: grams(ProbeMemory())),
        "row_loop": Task(row_loop),
        "lanczos_4": Task(lambda: lanczos(4)),
        "lanczos_8": Task(lambda: lanczos(8)),
    }


def measure(work: dict[str, Task], repeats: int, device: torch.device) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        gc.collect()
        for name, task in work.items():
            seconds = timed(task, device)
            if repeat:  # the first round warms up
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: medians[name] / medians["gradient"] for name in work}
    ratios["hessian_product"] = (ratios.pop("lanczos_8") - ratios.pop("lanczos_4")) / 4
    return {"gradient_seconds": medians["gradient"], **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {}
    for name, case in cases(device).items():
        rows[name] = measure(tasks(*case), options.repeats, device)
        print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"environment": environment, "ratio_to_gradient": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
