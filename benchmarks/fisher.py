"""What the Grams behind the per-block Fisher spectra cost: time, memory, accuracy, growth; against plain passes and peers.

One plain pass is one forward and one backward pass to the parameter gradients of the same rows with the kernels training
uses. `fisher` is what a callback runs from its second probe on (the layout was certified on the first), every tool being
timed on a model prepared for it; `fisher_with_isolation` counts that preparation, a few milliseconds a probe, too.
Ratios are those of medians of interleaved repeats inside one process on one thread, in CPU time (wall time on CUDA): as many
rounds as asked for, more of short ones; ours is the median of three processes.

    python benchmarks/fisher.py --out benchmarks/results/fisher.json
    python benchmarks/fisher.py --only vit_n64 --sections time,memory
    python benchmarks/fisher.py --quick

Sections: `time` (with accuracy and peers), `memory`, `streaming`, `scaling`.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from fisher_cases import Case, Workload, cases, gpt2, quick_cases
from fisher_memory import peak_in_own_process
from fisher_peers import PEERS
from fisher_time import times
from fisher_work import (
    OURS,
    PLAIN,
    Task,
    block_names,
    certified,
    interleaved,
    one_line,
    oracle,
    plain,
    prepared,
    ratios,
    whole_error,
    worst_error,
)

from curvature_callbacks.model.blocks import Granularity

MEMORY_ALLOWANCE = 256  # MiB above the plain pass
PROCESSES = 3  # that ours is timed in, see `fisher_time`
LEAST_SECONDS = 30.0  # of timing a case
STREAMING_LIMIT = 1.3  # times the single batch
SMALL_BUDGET, QUICK_BUDGET = 128 << 20, 64 << 10  # bytes, less than the factors of all microbatches take
STREAMED = ("gpt2_tied_n64", "vit_n64", "mlp_3x512_n256", "gpt2_tied_quick")

Table = dict[str, Any]


def time_and_accuracy(name: str, case: Case, workload: Workload, *, timing: Mapping[str, Any], device: torch.device) -> Table:
    """Ratios to the plain pass and errors against the float64 loop, of ours and of every peer."""
    exact = oracle(workload, min(case.oracle_rows, case.N))
    row: Table = {
        "accuracy_limit": case.accuracy_limit,
        "smooth": case.smooth,
        "rows_compared": len(next(iter(exact.values()))),
    }
    row["num_parameters"] = sum(parameter.numel() for parameter in workload.model.parameters())
    found = certified(workload)()
    row["row_by_row"] = sorted(found.fallback)
    row["worst_block"], row["error"] = worst_error(found.grams, exact)
    row["whole_error"] = whole_error(found.grams, exact)
    _, row["row_loop_error"] = worst_error(prepared("row_loop", workload)(), exact)
    if not case.timed:
        return row
    row |= {"limit": case.limit, "aim": case.aim, **times(name, **timing, device=device)}
    repeats = max(1, timing["rounds"] // 2)
    row["peers"] = {tool: peer(tool, workload, exact, repeats, device) for tool in PEERS}
    return row


def peer(name: str, workload: Workload, exact: Mapping[str, torch.Tensor], repeats: int, device: torch.device) -> Table:
    """Ratio and error of one peer, or the error it ended with: it may not support the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each tool has its own about hooks and missing batching rules
        try:
            task = prepared(name, workload)
            error = worst_error(task(), exact)[1]
            work = {PLAIN: prepared(PLAIN, workload), name: task}
            return {"ratio": ratios(interleaved(work, repeats, device))[name], "error": error}
        except Exception as failure:
            return {"failed": one_line(failure)}


def memory(name: str, device: torch.device, *, quick: bool) -> Table:
    """Peaks in MiB above model and data, one process each; an error in place of the figure where a peer ends with one."""
    rows = (PLAIN, OURS, *(() if quick else PEERS))
    peaks = {row: peak_in_own_process(name, row, device) for row in rows}
    found = {row: peak.get("peak_mib", peak.get("error")) for row, peak in peaks.items()}
    return {**found, "limit": peaks[PLAIN]["peak_mib"] + MEMORY_ALLOWANCE}


def streaming(workload: Workload, *, small_budget: int, repeats: int, device: torch.device) -> Table:
    """The rows in eight microbatches against the same rows in one: factors kept, and under a budget too small for them."""
    size = max(1, workload.num_samples // 8)
    parts = workload.microbatches(size)
    ours = {
        OURS: certified(workload),
        f"{OURS}, microbatches": certified(workload, microbatches=parts),
        f"{OURS}, microbatches, {small_budget >> 10} KiB": certified(workload, microbatches=parts, memory_budget=small_budget),
    }
    work = {PLAIN: prepared(PLAIN, workload), f"{PLAIN}, microbatches": Task(lambda: plain(workload, parts)), **ours}
    seconds = interleaved(work, repeats, device)
    to_single = {row: value for row, value in ratios(seconds, OURS).items() if row in ours}
    return {
        "microbatch_size": size,
        "limit": STREAMING_LIMIT,
        "storage": {row: task().mode for row, task in ours.items()},
        "to_single_batch": to_single,
        "to_plain": ratios(seconds),
    }


def scaling(*, quick: bool, repeats: int, device: torch.device) -> Table:
    """Cost over N, T, depth and number of blocks, with the exponents of a power law."""
    shape = {"N": 8, "T": 32, "layers": 2, "width": 64, "vocabulary": 256}
    sweeps = {"N": (8, 16, 32, 64, 128, 256), "T": (16, 32, 64, 128, 256, 512), "layers": (2, 4, 8, 16, 24)}
    if quick:
        shape, sweeps = {**shape, "width": 16}, {axis: values[:2] for axis, values in sweeps.items()}
    found: Table = {}
    for axis, values in sweeps.items():
        points = [_point(gpt2(device, **{**shape, axis: value}), "layer", repeats, device) for value in values]
        found["depth" if axis == "layers" else axis] = _growth(list(values), points)
    workload = gpt2(device, **{**shape, "layers": 2 if quick else 12})
    structures: tuple[Granularity, ...] = ("none", "layer", "component", "parameter")
    points = [_point(workload, structure, repeats, device) for structure in structures]
    found["blocks"] = _growth([len(block_names(workload, structure)) for structure in structures], points)
    return found


def _point(workload: Workload, structure: Granularity, repeats: int, device: torch.device) -> dict[str, float]:
    work = {PLAIN: prepared(PLAIN, workload), OURS: certified(workload, block_structure=structure)}
    seconds = interleaved(work, repeats, device)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _growth(values: list[int], points: list[dict[str, float]]) -> Table:
    """Seconds at every value and the slope of their logarithms; that of the extra cost only where all of it is positive."""
    columns = {name: [point[name] for point in points] for name in (PLAIN, OURS)}
    extra = [ours - reference for ours, reference in zip(columns[OURS], columns[PLAIN], strict=True)]
    exponents: Table = {name: _exponent(values, seconds) for name, seconds in columns.items()}
    exponents["extra"] = _exponent(values, extra) if min(extra) > 0 else None
    ratio = [ours / reference for ours, reference in zip(columns[OURS], columns[PLAIN], strict=True)]
    return {"values": values, "seconds": columns, "ratio": ratio, "exponent": exponents}


def _exponent(values: list[int], seconds: list[float]) -> float:
    logs = torch.tensor([values, seconds], dtype=torch.float64).log()
    x, y = logs - logs.mean(1, keepdim=True)
    return float((x @ y) / (x @ x))


def run(options: argparse.Namespace, device: torch.device) -> Table:
    """All sections that were asked for."""
    table = quick_cases() if options.quick else cases()
    timing = {
        "rounds": options.repeats,
        "processes": 1 if options.quick else PROCESSES,
        "least_seconds": 0.0 if options.quick else LEAST_SECONDS,
    }
    small_budget = QUICK_BUDGET if options.quick else SMALL_BUDGET
    chosen = {name: case for name, case in table.items() if not options.only or name in options.only}
    sections: dict[str, Callable[[str, Case], Table | None]] = {
        "time": lambda name, case: time_and_accuracy(name, case, seeded(case, device), timing=timing, device=device),
        "memory": lambda name, case: memory(name, device, quick=options.quick) if case.timed else None,
        "streaming": lambda name, case: (
            streaming(seeded(case, device), small_budget=small_budget, repeats=options.repeats, device=device)
            if name in STREAMED
            else None
        ),
    }
    results: Table = {}
    for section in [section for section in sections if section in options.sections]:
        for name, case in chosen.items():
            found = sections[section](name, case)
            if found is not None:
                results.setdefault(section, {})[name] = found
                show(section, name, found)
    if "scaling" in options.sections and not options.only:
        results["scaling"] = scaling(quick=options.quick, repeats=options.repeats, device=device)
        for axis, found in results["scaling"].items():
            show("scaling", axis, found)
    return results


def seeded(case: Case, device: torch.device) -> Workload:
    torch.manual_seed(0)
    return case.build(device)


def show(section: str, name: str, found: Table) -> None:
    """A few lines a row, rounded; a limit that is missed says so."""
    print(f"[{section}] {name}")
    for key, value in _rounded(found).items():
        print(f"    {key}: {len(value)} parameters" if key == "row_by_row" else f"    {key}: {value}")
    for what in [what for what, missed in _misses(section, found).items() if missed]:
        print(f"    MISSED: {what}")
    sys.stdout.flush()


def _misses(section: str, found: Table) -> dict[str, bool]:
    if section == "time":
        accuracy = found["smooth"] and not found["error"] <= found["accuracy_limit"]
        return {"time": "ratio" in found and found["ratio"] > found["limit"], "accuracy": accuracy}
    if section == "memory":
        return {"memory": not isinstance(found[OURS], float) or found[OURS] > found["limit"]}
    if section == "streaming":
        return {row: value > found["limit"] for row, value in found["to_single_batch"].items()}
    return {}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def environment(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "transformers", "opacus", "backpack-for-pytorch")
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) if name in installed else "absent" for name in packages},
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="peers take half as many")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that all of it runs")
    parser.add_argument("--only", action="append", metavar="CASE", help="may be given several times; leaves scaling out")
    parser.add_argument("--sections", type=lambda text: text.split(","), default=["time", "memory", "streaming", "scaling"])
    options = parser.parse_args()
    if options.quick:
        options.repeats = 1
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    start = time.perf_counter()
    results = run(options, device)
    results = {"environment": environment(device), "wall_seconds": time.perf_counter() - start, **results}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
