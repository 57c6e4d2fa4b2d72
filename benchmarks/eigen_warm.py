"""Section `warm`: products to tolerance from the last probe's vectors against a random start, while the model trains on.

In mid-training: in the first hundred Adam steps of a fresh model the largest eigenvector turns within a step (overlap 0.06 to
0.2 with the one before, measured on both models), and nothing is gained from it.
"""

from typing import Any

import torch
from eigen_cases import Trained, train
from eigen_solver import Flat
from fisher_cases import Workload

from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos.solver import lanczos

TOP_LIMIT = 0.5  # of the products of a cold start, for the largest eigenvalue
ENDS_LIMIT = 1.0  # of those of a cold start, for both ends
JUDGED_TOL = 1e-2  # the default of the measurements that start warm
MOST_DIFFERENCE = 1e-2  # between warm and cold eigenvalues; an end that was missed differs by far more
_SETTLED = {"gpt2_660k": (500, 3e-4), "mlp_3x512": (200, 1e-4)}  # further steps, and the rate from there on
_AFTER = (1, 10, 50)  # training steps between the probes
_TOLS = (JUDGED_TOL, 1e-3)
_ASKED: dict[str, dict[str, Any]] = {
    "largest": {"k": 1, "which": "LA"},
    "both_ends": {"k": 10, "which": "BE"},
}
_LIMITS = {"largest": TOP_LIMIT, "both_ends": ENDS_LIMIT}

Table = dict[str, Any]


def warm(name: str, trained: Trained, workload: Workload, *, quick: bool) -> Table:
    """Every distance between probes, on the same probe batch and on a new one."""
    draw, most = trained.draw(workload), 60 if quick else 400
    further, rate = _SETTLED.get(name, (0, trained.rate))
    done = trained.steps + further
    train(workload, draw, steps=further, first=trained.steps, rate=rate)
    row: Table = {"limits": _LIMITS, "judged_tol": JUDGED_TOL, "steps_before": done}
    starts = {(asked, tol): _pairs(workload, asked, tol, most, None).starting_vector() for asked in _ASKED for tol in _TOLS}
    for steps in _AFTER[:1] if quick else _AFTER:
        until = trained.steps + further + steps
        train(workload, draw, steps=until - done, first=done, rate=rate)
        done = until
        for batch, label in ((-1, "same batch"), (-2, "new batch")):
            now = Workload(workload.model, draw(workload.num_samples, batch), workload.targets_per_row)
            for (asked, tol), start in starts.items():
                verdict = _compared(now, asked, tol, most, start)
                row.setdefault(f"{asked}, tol {tol:g}", {})[f"{steps} steps, {label}"] = verdict
    return row


def _compared(now: Workload, asked: str, tol: float, most: int, start: torch.Tensor) -> Table:
    cold, found = _pairs(now, asked, tol, most, None), _pairs(now, asked, tol, most, start)
    difference = ((found.eigenvalues - cold.eigenvalues).abs() / cold.eigenvalues.abs()).max().item()
    share = found.num_matvecs / cold.num_matvecs
    both = bool(found.converged.all() and cold.converged.all())
    verdict: Table = {
        "cold": cold.num_matvecs,
        "warm": found.num_matvecs,
        "share": share,
        "difference": difference,
        "all_converged": both,
    }
    if tol == JUDGED_TOL:
        verdict["met"] = both and share <= _LIMITS[asked] and difference <= MOST_DIFFERENCE
    return verdict


def _pairs(workload: Workload, asked: str, tol: float, most: int, start: torch.Tensor | None) -> Eigenpairs:
    vectors = {} if start is None else {"initial_vectors": start[:, None]}
    operator = Flat(workload, "hessian")
    return lanczos(operator, **_ASKED[asked], tol=tol, max_matvecs=most, return_eigenvectors=True, **vectors)
