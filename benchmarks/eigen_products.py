"""Section `products`: one product relative to one gradient of the same batch, ours through kept graphs and the peers'."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from eigen_judge import exact_products
from eigen_peers import Curvature, Products, curvlinops_products, eigenthings_products, our_products
from fisher_cases import Family, Workload
from fisher_work import PLAIN, Task, interleaved, one_line, prepared
from torch import Tensor

from curvature_callbacks.isolation.model import isolated

OURS = "ours"
PEERS = {"curvlinops": curvlinops_products, "hessian_eigenthings": eigenthings_products}
CURVATURES: tuple[Curvature, ...] = ("hessian", "ggn", "empirical_fisher", "empirical_fisher_token")
_LIMITS: dict[Curvature, float] = {"hessian": 2.4, "ggn": 1.45, "empirical_fisher": 1.45, "empirical_fisher_token": 1.45}
_HESSIAN_OF_CONVOLUTIONS = 3.2
_COLUMNS = 4  # the larger K
_SEVERAL_AT_ONCE = (OURS, "curvlinops")  # the others take one vector

Table = dict[str, Any]


def products(workload: Workload, family: Family, *, repeats: int, least_seconds: float, device: torch.device) -> Table:
    """Every operator's row."""
    kinds = [kind for kind in CURVATURES if kind != "empirical_fisher_token" or workload.targets_per_row > 1]
    return {kind: _row(workload, kind, _limit(kind, family), repeats, least_seconds, device) for kind in kinds}


def _limit(kind: Curvature, family: Family) -> float | None:
    """None where none was set: the GGN and the Fishers of convolutions."""
    if family == "convolution":
        return _HESSIAN_OF_CONVOLUTIONS if kind == "hessian" else None
    return _LIMITS[kind]


def _row(
    workload: Workload, kind: Curvature, limit: float | None, repeats: int, least_seconds: float, device: torch.device
) -> Table:
    P = sum(parameter.numel() for parameter in workload.model.parameters())
    V = torch.randn(P, _COLUMNS, generator=torch.Generator().manual_seed(0)).to(device)
    exact = exact_products(workload, kind, V[:, :1]) if kind in ("hessian", "ggn") else None
    row: Table = {"limit": limit}
    tasks: dict[str, Task] = {PLAIN: prepared(PLAIN, workload)}
    for name, build in {OURS: our_products, **PEERS}.items():
        try:
            product = build(workload, kind)
            row[name] = _error(product(V[:, :1]), exact)
        except Exception as failure:  # a table has a cell for it
            row[name] = {"failed": one_line(failure)}
            continue
        tasks |= _tasks(name, product, V, workload)
    seconds = interleaved(tasks, repeats, device, least_seconds=least_seconds)
    row["gradient_seconds"] = statistics.median(seconds[PLAIN])
    for task in [task for task in tasks if task != PLAIN]:
        name, columns = task.split(" K=")
        row[name][f"ratio_k{columns}"] = _ratio(seconds[task], seconds[PLAIN], int(columns))
    if limit is not None:
        row["met"] = "failed" not in row[OURS] and row[OURS]["ratio_k1"]["median"] <= limit
    return row


def _tasks(name: str, product: Products, V: Tensor, workload: Workload) -> dict[str, Task]:
    """Ours isolated as in a probe; entering that is not timed, and its graphs are kept."""
    ready = partial(_isolation, workload) if name == OURS else partial(nullcontext, ())
    widths = (V[:, :1], V) if name in _SEVERAL_AT_ONCE else (V[:, :1],)
    return {f"{name} K={columns.shape[1]}": Task(partial(product, columns), ready) for columns in widths}


@contextmanager
def _isolation(workload: Workload) -> Iterator[tuple[()]]:
    with isolated(workload.model, seed=0):
        yield ()


def _error(found: Tensor, exact: Tensor | None) -> Table:
    if exact is None:
        return {}
    return {"relative_error": ((found.double() - exact).norm() / exact.norm()).item()}


def _ratio(seconds: list[float], plain: list[float], columns: int) -> Table:
    """Gradients per product: medians, and the quartiles over rounds."""
    rounds = [one / columns / reference for one, reference in zip(seconds, plain, strict=True)]
    quartiles = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else rounds * 3
    median = statistics.median(seconds) / columns / statistics.median(plain)
    return {"median": median, "quartiles": [quartiles[0], quartiles[2]], "rounds": len(rounds)}
