"""Times of one case of the Fisher benchmark, plain and ours by turns, in a process of its own.

Where memory comes to lie and which of it is new differs from process to process, and with it the ratio, by more than rounds of
one process do (0.06 on the small GPT-2): hence several processes.

    python benchmarks/fisher_time.py --case vit_n64 --rounds 3
"""

import argparse
import json
import subprocess
import sys
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from fisher_cases import cases, quick_cases
from fisher_work import OURS, PLAIN, PROBE, certified, interleaved, prepared, ratios


def times(case: str, rounds: int, least_seconds: float, processes: int, device: torch.device) -> dict[str, Any]:
    """Ratios to the plain pass: medians over the processes of those of their medians, and what they were made of.

    Args:
        case: which.
        rounds: at least, of all processes together.
        least_seconds: of timing, of all processes together.
        processes: how many.
        device: where they run.
    """
    command = [sys.executable, __file__, "--case", case, "--device", str(device)]
    command += ["--rounds", str(-(-rounds // processes)), "--least-seconds", str(least_seconds / processes)]
    runs: list[dict[str, list[float]]] = []
    for _ in range(processes):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    found = [ratios(seconds) for seconds in runs]
    pairs = [ours / plain for seconds in runs for ours, plain in zip(seconds[OURS], seconds[PLAIN], strict=True)]
    return {
        "ratio": median(ratio[OURS] for ratio in found),
        "ratio_with_isolation": median(ratio[PROBE] for ratio in found),
        "ratio_by_process": [ratio[OURS] for ratio in found],
        "ratio_quartiles": quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3,
        "rounds": len(pairs),
        "plain_seconds": median(second for seconds in runs for second in seconds[PLAIN]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least-seconds", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    workload = {**cases(), **quick_cases()}[options.case].build(device)
    ours = certified(workload)
    tasks = {PLAIN: prepared(PLAIN, workload), OURS: ours, PROBE: ours.whole()}
    print(json.dumps(interleaved(tasks, options.rounds, device, least_seconds=options.least_seconds)))


if __name__ == "__main__":
    main()
