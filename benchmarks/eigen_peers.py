"""Products of the peers' operators and of ours, as functions of columns (P, K), and the peers' eigensolvers.

Peers see a classifier: inputs to logits of one row per target. They run with math attention, as ours does: the fused kernels
of a CPU have no second derivative.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from fisher_cases import Workload
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.problem.problem import Problem

Curvature = Literal["hessian", "ggn", "empirical_fisher", "empirical_fisher_token"]
Products = Callable[[Tensor], Tensor]  # (P, K) -> (P, K)


class NotOfferedError(Exception):
    """The peer has nothing of this kind."""


class BudgetSpentError(Exception):
    """The peer asked for more products than it was allowed."""


@final
class Classifier(nn.Module):
    """The model as a map from inputs to logits (targets, classes)."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.model = workload.model
        self.is_text = isinstance(workload.batch, dict) and "input_ids" in workload.batch

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.model(inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        return logits[:, :-1].flatten(0, 1) if self.is_text else logits


def pairs(workload: Workload) -> tuple[Tensor, Tensor]:
    """Inputs, and the targets of `Classifier`'s rows."""
    inputs, targets = workload.batch.values() if isinstance(workload.batch, dict) else workload.batch
    return inputs, targets[:, 1:].flatten() if targets.ndim > 1 else targets


@final
@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a solver returned.

    Attributes:
        eigenvalues: (k,)
        eigenvectors: (P, k)
        num_matvecs: products spent.
        note: what else it says about itself.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    num_matvecs: int
    note: str = ""


@contextmanager
def quiet() -> Iterator[None]:
    """Math attention; without the peers' own warnings."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        yield


def our_products(workload: Workload, curvature: Curvature) -> Products:
    """Our operator, its graphs built."""
    with isolated(workload.model, seed=0):
        problem = Problem(workload.model, [workload.batch], loss=workload.loss)
        if curvature == "ggn":
            return problem.ggn().matmat
        if curvature == "hessian":
            return problem.hessian().matmat
        return problem.empirical_fisher(sample_unit="token" if curvature == "empirical_fisher_token" else "sequence").matmat


def curvlinops_products(workload: Workload, curvature: Curvature) -> Products:
    """curvlinops' operator; several vectors at once go through its `vmap`."""
    operator = _curvlinops(workload, curvature)

    def products(V: Tensor) -> Tensor:
        with quiet():
            return operator @ V

    return products


def eigenthings_products(workload: Workload, curvature: Curvature) -> Products:
    """hessian-eigenthings' operator, column by column as it has nothing else."""
    operator = _eigenthings(workload, curvature)

    def products(V: Tensor) -> Tensor:
        with quiet():
            return torch.stack([operator.matvec(v.contiguous()) for v in V.T], dim=1)

    return products


def curvlinops_eigsh(
    workload: Workload, curvature: Curvature, *, k: int, which: str, tol: float, basis: int, most: int
) -> Found:
    """SciPy's ARPACK on curvlinops' operator, whose `tol` is relative to each `|theta|`, as ours.

    Args:
        basis: ARPACK's `ncv`.
        most: products allowed.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    products, count = curvlinops_products(workload, curvature), 0
    size = sum(parameter.numel() for parameter in workload.model.parameters())

    def product(v: Any) -> Any:
        nonlocal count
        count += 1
        if count > most:
            raise BudgetSpentError(f"more than {most} products")
        return products(torch.as_tensor(v).reshape(-1, 1))[:, 0].detach().numpy()

    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).numpy()
    operator = LinearOperator((size, size), matvec=product, dtype=start.dtype)
    values, vectors = eigsh(operator, k=k, which=which, tol=tol, ncv=basis, v0=start)
    return Found(torch.as_tensor(values), torch.as_tensor(vectors), count, f"ncv={basis}")


def eigenthings_lanczos(workload: Workload, curvature: Curvature, *, k: int, which: str, tol: float, steps: int) -> Found:
    """hessian-eigenthings' Lanczos with full reorthogonalisation.

    It has neither both ends nor a stopping rule. It is given the number of steps, and for both ends all Ritz pairs of one run
    are asked for (twice the memory, half the products of one run per end).
    """
    from hessian_eigenthings.algorithms.lanczos import lanczos

    operator = _eigenthings(workload, curvature)
    wanted = {"k": steps, "which": "LM"} if which == "BE" else {"k": k, "which": which}
    with quiet():
        found = lanczos(operator, **wanted, max_iter=steps, tol=tol, seed=0, reorthogonalize=True)
    order = found.eigenvalues.argsort(descending=True)
    if which == "BE":
        order = torch.cat([order[: k - k // 2], order[len(order) - k // 2 :]])
    return Found(found.eigenvalues[order], found.eigenvectors[order].T, found.iterations, f"{steps} steps given")


def pyhessian_power(workload: Workload, curvature: Curvature, *, k: int, tol: float, most: int) -> Found:
    """PyHessian's power iteration with deflation through a kept graph: the largest in magnitude, one after the other."""
    if curvature != "hessian":
        raise NotOfferedError(f"no {curvature}")
    from pyhessian import hessian

    module, count = sys.modules["pyhessian.hessian"], 0
    product = module.hessian_vector_product

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return product(*arguments)

    module.hessian_vector_product = counted
    torch.manual_seed(0)
    try:
        with quiet():
            tool = hessian(Classifier(workload), nn.CrossEntropyLoss(), data=pairs(workload), cuda=False)
            values, vectors = tool.eigenvalues(maxIter=most // k, tol=tol, top_n=k)
    finally:
        module.hessian_vector_product = product
    columns = [torch.cat([part.detach().flatten() for part in vector]) for vector in vectors]
    return Found(torch.tensor(values), torch.stack(columns, dim=1), count, f"at most {most // k} products a pair")


def _curvlinops(workload: Workload, curvature: Curvature) -> Any:
    from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator

    kinds = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator, "empirical_fisher_token": EFLinearOperator}
    model = Classifier(workload)
    if curvature not in kinds:
        raise NotOfferedError("its Fisher is over targets: see empirical_fisher_token")
    parameters = list(model.parameters())
    return kinds[curvature](model, nn.CrossEntropyLoss(), parameters, [pairs(workload)], check_deterministic=False)


def _eigenthings(workload: Workload, curvature: Curvature) -> Any:
    from hessian_eigenthings.loss_fns.standard import supervised_forward, supervised_loss, supervised_loss_of_output
    from hessian_eigenthings.operators import GGNOperator, HessianOperator

    if curvature not in ("hessian", "ggn"):
        raise NotOfferedError("its Fisher takes one gradient per row in memory: not a product by kept graphs")
    model, data, loss = Classifier(workload), [pairs(workload)], nn.functional.cross_entropy
    if curvature == "hessian":
        return HessianOperator(model, data, supervised_loss(loss))
    return GGNOperator(model, data, supervised_forward, supervised_loss_of_output(loss))
