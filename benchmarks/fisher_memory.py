"""Peak memory of one row of the Fisher benchmark above model and data, in a process of its own.

On Linux the high-water mark of the resident set, reset after the model, the data and one warm-up on two rows are there (the
code of the kernels is paged in by then); on CUDA the allocator's own peak.

    python benchmarks/fisher_memory.py --case vit_n64 --row fisher
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from fisher_cases import cases, quick_cases
from fisher_work import prepared
from memory_gauge import held, peak, reset

_WARM_UP_ROWS = 2


def peak_in_own_process(case: str, row: str, device: torch.device) -> dict[str, Any]:
    """`{"peak_mib": ...}` or `{"error": ...}` of one row."""
    command = [sys.executable, __file__, "--case", case, "--row", row, "--device", str(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": (lines[-1] if lines else f"ended with {done.returncode}")[:160]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(case: str, row: str, device: torch.device) -> float:
    """MiB above model and data."""
    torch.manual_seed(0)
    workload = {**cases(), **quick_cases()}[case].build(device)
    prepared(row, workload.to(torch.float32, torch.arange(_WARM_UP_ROWS)))()
    run = prepared(row, workload)
    reset(device)
    before = held(device)
    run()
    return (peak(device) - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True)
    parser.add_argument("--row", required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"peak_mib": round(measured(options.case, options.row, torch.device(options.device)), 1)}))


if __name__ == "__main__":
    main()
