"""Section `warm`: products to tolerance from the last probe's vectors against a random start, while the model trains on."""

from typing import Any

import torch
from eigen_cases import Draw, Trained, train
from eigen_solver import Flat
from fisher_cases import Workload

from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos import lanczos

TOP_LIMIT = 0.5  # of the products of a cold start, for the largest eigenvalue
ENDS_LIMIT = 1.0  # of those of a cold start, for both ends
MOST_DIFFERENCE = 1e-2  # between warm and cold eigenvalues; an end that was missed differs by far more
_AFTER = (1, 10, 50)  # training steps between the probes
_TOL = 1e-3
_ASKED: dict[str, dict[str, Any]] = {
    "largest": {"k": 1, "which": "LA"},
    "both_ends": {"k": 10, "which": "BE"},
}

Table = dict[str, Any]


def warm(trained: Trained, workload: Workload, *, quick: bool) -> Table:
    """Every distance between probes, on the same probe batch and on a new one."""
    draw, most = trained.draw(workload), 60 if quick else 400
    before = {name: _pairs(workload, asked, most, None) for name, asked in _ASKED.items()}
    row: Table = {"limits": {"largest": TOP_LIMIT, "both_ends": ENDS_LIMIT}, "cold_at_start": _products(before)}
    done = 0
    for steps in _AFTER[:1] if quick else _AFTER:
        train(workload, draw, steps=steps - done, first=trained.steps + done, rate=trained.rate)
        done = steps
        for batch, name in ((-1, "same batch"), (-2, "new batch")):
            row[f"{steps} steps, {name}"] = _compared(workload, draw, batch, before, most)
    return row


def _compared(workload: Workload, draw: Draw, seed: int, before: dict[str, Eigenpairs], most: int) -> Table:
    now = Workload(workload.model, draw(workload.num_samples, seed), workload.targets_per_row)
    row: Table = {}
    for name, asked in _ASKED.items():
        cold = _pairs(now, asked, most, None)
        try:
            found = _pairs(now, asked, most, before[name].eigenvectors)
        except Exception as failure:
            row[name] = {"cold": cold.num_matvecs, "failed": f"{type(failure).__name__}: {failure}"[:160]}
            continue
        row[name] = _verdict(found, cold, {"largest": TOP_LIMIT, "both_ends": ENDS_LIMIT}[name])
    return row


def _verdict(found: Eigenpairs, cold: Eigenpairs, limit: float) -> Table:
    difference = ((found.eigenvalues - cold.eigenvalues).abs() / cold.eigenvalues.abs()).max().item()
    share = found.num_matvecs / cold.num_matvecs
    both = bool(found.converged.all() and cold.converged.all())
    return {
        "cold": cold.num_matvecs,
        "warm": found.num_matvecs,
        "share": share,
        "difference": difference,
        "all_converged": both,
        "met": both and share <= limit and difference <= MOST_DIFFERENCE,
    }


def _pairs(workload: Workload, asked: dict[str, Any], most: int, vectors: torch.Tensor | None) -> Eigenpairs:
    start = {} if vectors is None else {"initial_vectors": vectors}
    operator = Flat(workload, "hessian")
    return lanczos(operator, **asked, tol=_TOL, max_matvecs=most, return_eigenvectors=True, **start)


def _products(pairs: dict[str, Eigenpairs]) -> dict[str, int]:
    return {name: found.num_matvecs for name, found in pairs.items()}
