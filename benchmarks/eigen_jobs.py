"""Section `jobs`: outer eigenpairs from model and batch to the answer, each tool in a process of its own.

Timed is everything from the model to the pairs, graphs and self-checks included; on a CPU in process CPU time on one thread.
Peak memory is the high-water mark above model and data after a warm-up (the tool on a tiny model, one gradient); for its sake
collections stay on here, a tool that leaves cycles behind pays for them. Then the pairs are judged in float64.

    python benchmarks/eigen_jobs.py --case mlp_3x512 --tool ours --curvature ggn --weights FILE
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from eigen_cases import table
from eigen_judge import true_residuals
from eigen_peers import Found, curvlinops_eigsh, eigenthings_lanczos, pyhessian_power
from fisher_cases import Workload
from fisher_work import one_line, plain
from memory_gauge import held, peak, reset

from curvature_callbacks import compute_spectrum

JOBS: dict[str, dict[str, Any]] = {"ggn": {"k": 10, "which": "LA"}, "hessian": {"k": 10, "which": "BE"}}
TOL = 1e-3
MOST_PRODUCTS = 400  # what a tool may spend
_MET = 1.02  # times TOL: the judge's float64 operator differs from everybody's float32 one by rounding
OURS, EIGENTHINGS = "ours", "eigenthings_lanczos"
TOOLS = (OURS, "curvlinops_eigsh_ncv21", "curvlinops_eigsh_ncv40", "curvlinops_eigsh_ncv80", EIGENTHINGS, "pyhessian")

Table = dict[str, Any]


def job(case: str, curvature: str, weights: Path, *, tools: Sequence[str], repeats: int, device: torch.device) -> Table:
    """Every tool on one of `JOBS`; its repeats go round the tools."""
    row: Table = {**JOBS[curvature], "tol": TOL, "most_products": MOST_PRODUCTS}
    common = {"case": case, "curvature": curvature, "weights": str(weights), "device": str(device)}
    runs: dict[str, list[Table]] = {tool: [] for tool in tools}
    steps = 0
    for _ in range(repeats):
        for tool in tools:
            if runs[tool] and "failed" in runs[tool][-1]:
                continue
            found = _own_process(common | {"tool": tool, "steps": steps}) if tool != EIGENTHINGS else _stepwise(common, steps)
            steps = found.get("num_matvecs", steps) if tool == OURS else steps
            runs[tool].append(found)
    medians = {tool: _medians(found) for tool, found in runs.items()}
    met = {tool: found["seconds"] for tool, found in medians.items() if found.get("met")}
    row |= {"met": bool(medians[OURS].get("met")), "fastest_that_met": min(met, key=met.__getitem__, default="none")}
    return row | {"tools": _compared(medians)}


def _stepwise(common: Mapping[str, Any], steps: int) -> Table:
    """The smallest sufficient number of steps among our products, rounded up, and half as many again, twice.

    The time of the attempts that did not suffice is not counted.
    """
    start = -(-(steps or 40) // 10) * 10
    found: Table = {}
    for factor in (1.0, 1.5, 2.25):
        found = _own_process({**common, "tool": EIGENTHINGS, "steps": min(MOST_PRODUCTS, int(start * factor))})
        if found.get("met"):
            break
    return found


def _medians(runs: list[Table]) -> Table:
    """The last run's numbers, with medians of time and memory."""
    if any("failed" in run for run in runs):
        return next(run for run in runs if "failed" in run)
    seconds = [run["seconds"] for run in runs]
    peak = statistics.median(run["peak_mib"] for run in runs)
    spread = [min(seconds), max(seconds)]
    return {**runs[-1], "seconds": statistics.median(seconds), "seconds_range": spread, "peak_mib": peak, "rounds": len(runs)}


def _compared(tools: dict[str, Table]) -> dict[str, Table]:
    """Each tool's time in units of ours and its largest relative difference from our eigenvalues."""
    ours = tools[OURS]
    for found in tools.values():
        if "failed" in found or "failed" in ours:
            continue
        found["seconds_to_ours"] = found["seconds"] / ours["seconds"]
        reference = torch.tensor(ours["eigenvalues"], dtype=torch.float64)
        values = torch.tensor(found["eigenvalues"], dtype=torch.float64)
        found["difference_from_ours"] = ((values - reference) / reference).abs().max().item()
    return tools


def _own_process(options: Mapping[str, Any]) -> Table:
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": (lines[-1] if lines else f"ended with {done.returncode}")[:200]}
    found: Table = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(workload: Workload, tool: str, curvature: Literal["hessian", "ggn"], steps: int, device: torch.device) -> Table:
    """Time, memory, products, and what the judge says."""
    warm_up = table(quick=True)["mlp_quick"].build(device)
    with suppress(Exception):  # imports, not results
        _solve(warm_up, tool, curvature, steps=20)
    plain(workload)
    gc.collect()
    reset(device)
    before, start = held(device), _clock(device)
    try:
        found = _solve(workload, tool, curvature, steps)
    except Exception as failure:
        return {"failed": one_line(failure)}
    seconds, most = _clock(device) - start, (peak(device) - before) / 2**20
    values, order = found.eigenvalues.detach().sort(descending=True)
    vectors = found.eigenvectors.detach()[:, order.to(found.eigenvectors.device)]
    residuals = true_residuals(workload, curvature, values.to(vectors.device), vectors)
    return {
        "seconds": seconds,
        "peak_mib": most,
        "num_matvecs": found.num_matvecs,
        "worst_true_residual": residuals.max().item(),
        "met": bool(residuals.max() <= _MET * TOL),
        "num_met": int((residuals <= _MET * TOL).sum()),
        "eigenvalues": values.tolist(),
        "note": found.note,
    }


def _solve(workload: Workload, tool: str, curvature: Literal["hessian", "ggn"], steps: int) -> Found:
    wanted = JOBS[curvature]
    if tool == OURS:
        return _ours(workload, curvature)
    if tool.startswith("curvlinops"):
        return curvlinops_eigsh(workload, curvature, **wanted, tol=TOL, basis=int(tool.split("ncv")[1]), most=MOST_PRODUCTS)
    if tool == EIGENTHINGS:
        return eigenthings_lanczos(workload, curvature, **wanted, tol=TOL, steps=steps)
    return pyhessian_power(workload, curvature, k=wanted["k"], tol=TOL, most=MOST_PRODUCTS)


def _ours(workload: Workload, curvature: Any) -> Found:
    pairs = compute_spectrum(
        workload.model,
        workload.batch,
        operator=curvature,
        loss=workload.loss,
        **JOBS[curvature],
        tol=TOL,
        max_matvecs=MOST_PRODUCTS,
        return_eigenvectors=True,
    )
    assert pairs.eigenvectors is not None
    return Found(pairs.eigenvalues, pairs.eigenvectors, pairs.num_matvecs, "; ".join([pairs.reorth_mode, *pairs.warnings]))


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True)
    parser.add_argument("--tool", required=True, choices=TOOLS)
    parser.add_argument("--curvature", required=True, choices=list(JOBS))
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=0, help="for a tool that has no stopping rule")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    chosen = {**table(quick=False), **table(quick=True)}[options.case]
    workload = chosen.build(device, weights=torch.load(options.weights))
    print(json.dumps(measured(workload, options.tool, options.curvature, options.steps, device)))


if __name__ == "__main__":
    main()
