"""What outer eigenpairs cost: products, whole jobs, the solver itself, warm starts; against gradients and against peers.

The unit of a product is one gradient: a forward and a backward pass of the mean loss over the same batch with the kernels
training uses. One process on one thread, process CPU time, medians of interleaved rounds without collections (wall time on
CUDA). Peers: curvlinops with SciPy's `eigsh`, hessian-eigenthings, PyHessian; a cell says `failed` where one has nothing of the
kind or ends with an error. Models are trained for a few dozen steps on data of installed packages.

    python benchmarks/eigen.py --out benchmarks/results/eigen.json
    python benchmarks/eigen.py --only mlp_3x512 --sections products,jobs --repeats 3
    python benchmarks/eigen.py --quick

Sections: `products`, `jobs`, `overhead`, `accuracy`, `warm`, `bounded`. Those that are left out of a run keep what the file
already holds.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from eigen_cases import Trained, table, weights_of
from eigen_jobs import JOBS, TOOLS, job
from eigen_products import products
from eigen_solver import accuracy, bounded, overhead
from eigen_warm import warm
from fisher_cases import Workload

SECTIONS = ("products", "jobs", "overhead", "accuracy", "warm", "bounded")
LEAST_SECONDS = 20.0  # of timing one operator's products
_PACKAGES = ("torch", "transformers", "scipy", "curvlinops-for-pytorch", "hessian-eigenthings", "pyhessian")
_OF_SOLVER = {  # section to the models it takes: many runs of the solver, or one large vector
    "overhead": ("gpt2_4m", "gpt2_quick"),
    "accuracy": ("gpt2_660k", "mlp_3x512", "vit", "gpt2_quick"),
    "warm": ("gpt2_660k", "mlp_3x512", "gpt2_quick", "mlp_quick"),
    "bounded": ("gpt2_660k", "gpt2_quick"),
}

Table = dict[str, Any]


class Bench:
    """Options of one run and the weights that training gave, in files for the processes of single tools."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.folder = folder
        self.models = {
            name: trained for name, trained in table(quick=options.quick).items() if not options.only or name in options.only
        }

    def run(self) -> Iterator[tuple[str, str, Table]]:
        """`(section, model, row)`, model by model; of `jobs` a row for each."""
        sections: dict[str, Callable[[str], Table]] = {
            "products": self._products,
            "overhead": self._overhead,
            "accuracy": lambda name: accuracy(self._workload(name)),
            "warm": lambda name: warm(name, self.models[name], self._workload(name), quick=self.options.quick),
            "bounded": lambda name: bounded(self._workload(name), quick=self.options.quick),
        }
        for name, trained in self.models.items():
            for section in [section for section in SECTIONS if section in self.options.sections]:
                if not _takes(section, name, trained):
                    continue
                if section != "jobs":
                    yield section, name, sections[section](name)
                    continue
                for curvature in self.options.jobs:
                    yield section, name, {curvature: self._job(name, curvature)}

    def _products(self, name: str) -> Table:
        return products(
            self._workload(name),
            self.models[name].family,
            repeats=self.options.repeats,
            least_seconds=0.0 if self.options.quick else LEAST_SECONDS,
            device=self.device,
        )

    def _job(self, name: str, curvature: str) -> Table:
        rounds, tools = self.options.job_repeats, self.options.tools
        return job(name, curvature, self._weights(name), tools=tools, repeats=rounds, device=self.device)

    def _overhead(self, name: str) -> Table:
        P = 50_000 if self.options.quick else 5_000_000
        return overhead(self._workload(name), P=P, m=40, repeats=self.options.repeats, device=self.device)

    def _workload(self, name: str) -> Workload:
        return self.models[name].build(self.device, weights=torch.load(self._weights(name)))

    def _weights(self, name: str) -> Path:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            torch.save(weights_of(self.models[name].build(self.device)), path)
        return path


def _takes(section: str, name: str, trained: Trained) -> bool:
    if section == "jobs":
        return trained.jobs
    return section == "products" or name in _OF_SOLVER[section]


def show(section: str, name: str, row: Any, depth: int = 1) -> None:
    """A line a leaf, rounded; what is not met says so."""
    if depth == 1:
        print(f"[{section}] {name}")
    for key, value in row.items():
        nested = isinstance(value, dict) and any(isinstance(entry, dict) for entry in value.values())
        missed = isinstance(value, dict) and value.get("met") is False
        print(f"{'    ' * depth}{key}:{'' if nested else f' {_rounded(value)}'}{'  MISSED' if missed else ''}")
        if nested:
            show(section, name, value, depth + 1)
    sys.stdout.flush()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def environment(device: torch.device) -> dict[str, Any]:
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) if name in installed else "absent" for name in _PACKAGES},
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write(path: Path | None, results: Table) -> None:
    """After every row, so that a run that is stopped leaves what it found."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write, or to bring up to date")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds at least")
    parser.add_argument("--job-repeats", type=int, default=3, help="rounds of whole jobs")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that all of it runs")
    parser.add_argument("--only", action="append", metavar="CASE", help="may be given several times")
    parser.add_argument("--jobs", type=lambda text: text.split(","), default=list(JOBS))
    parser.add_argument(
        "--tools", type=lambda text: text.split(","), default=list(TOOLS), help="of whole jobs, ours among them"
    )
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    options = parser.parse_args()
    if options.quick:
        options.repeats = options.job_repeats = 1
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    held = json.loads(options.out.read_text()) if options.out is not None and options.out.exists() else {}
    results: Table = {**held, "environment": environment(torch.device(options.device))}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for section, name, row in Bench(options, Path(folder)).run():
            rows = results.setdefault(section, {})
            rows[name] = {**rows.get(name, {}), **row} if section == "jobs" else row
            show(section, name, row)
            write(options.out, results)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
