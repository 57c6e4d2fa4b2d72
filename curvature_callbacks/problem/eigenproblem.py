"""Eigenproblem: an operator of one probe, how it is checked and which eigensolver takes it."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Final, final

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.gram_eigenpairs import eigenpairs_of_gram
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import solve
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.checks import refusing_single_derivatives
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator, check_differences
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator, FisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.hessian import HessianOperator
from curvature_callbacks.operators.kfac import KFACOperator
from curvature_callbacks.operators.preconditioned import PreconditionedOperator
from curvature_callbacks.operators.replicated import ReplicatedOperator, ShardedFisherOperator
from curvature_callbacks.operators.self_checks import CHECK_PRODUCTS, check_adjoint, check_second_order, check_symmetric
from curvature_callbacks.problem.matrix import MatrixChoice
from curvature_callbacks.problem.problem import Problem

# The Gram of all rows cost 1.39 gradients where one product with the Fisher cost 1.41: any spectrum for the price of one step
# of Lanczos. Its eigensolve and its N x N products grow as N^3 and N^2; at 1000 rows they were still small.
_MAX_GRAM_SAMPLES: Final = 1000
_SYMMETRY_PRODUCTS: Final = 3  # what `check_symmetric` spends, and `check_second_order` without custom operations
_DIFFERENCE_PRODUCTS: Final = 2


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Eigenproblem:
    """What outer eigenpairs are wanted of.

    Attributes:
        operator: the operator; its graphs live as long as this.
        gram: (N, N) Gram of the operator's own rows, where its eigenpairs are to come from it; else None.
        about: what it is made of, for records.
    """

    operator: Operator
    gram: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_iterative(self) -> bool:
        """Whether Lanczos finds the pairs, from a start vector."""
        return self.gram is None and not isinstance(self.operator, KFACOperator)

    @property
    def num_params(self) -> int:
        """P, the dimension."""
        return InnerProducts(self.operator).dimension(self.operator.shape[0])

    def assembled(self, part: Tensor) -> Tensor:
        """(P,) on the host: the vector of which the operator holds `part` here."""
        return InnerProducts(self.operator).assembled(part).cpu()

    def start(self, kept: Tensor | None) -> Tensor | None:
        """What the operator holds here of a vector that `whole` gave at an earlier probe.

        None where that was of others, and on all processes where one of them has kept none (a checkpoint that it cannot read).
        """
        products, num_params = InnerProducts(self.operator), self.num_params
        here = products.part(kept) if kept is not None and len(kept) == num_params else kept
        missing = here is None or len(here) != self.operator.shape[0]
        return None if products.anywhere(missing) else here

    def check(self, *, seed: int) -> tuple[float, int]:
        """Largest relative error of the operator's self-check, and the products it spent; raises a `RefusedError`."""
        operator = self.operator
        if isinstance(operator, PreconditionedOperator):
            operator = operator.inner
        if isinstance(operator, ReplicatedOperator):  # each process checks its own derivatives
            return operator.checked(lambda local: Eigenproblem(operator=local).check(seed=seed))
        if isinstance(operator, KFACOperator):
            return 0.0, 0  # matrices, with nothing differentiated
        if isinstance(operator, FisherOperator | GGNOperator):
            with refusing_single_derivatives():
                return check_adjoint(operator, seed=seed), CHECK_PRODUCTS
        if isinstance(operator, FiniteDifferenceHessianOperator):
            return check_differences(operator, seed=seed), _DIFFERENCE_PRODUCTS
        if isinstance(operator, HessianOperator):
            with refusing_single_derivatives():
                return check_second_order(operator, seed=seed), _SYMMETRY_PRODUCTS
        return check_symmetric(operator, seed=seed), _SYMMETRY_PRODUCTS

    def solve(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        """The pairs: from the Gram or the factors where these give them, with true residuals, else by `lanczos`."""
        if self.gram is not None and isinstance(self.operator, EmpiricalFisherOperator | ShardedFisherOperator):
            return eigenpairs_of_gram(self.gram, self.operator, options)
        if isinstance(self.operator, KFACOperator):
            return self.operator.eigenpairs(options)
        if isinstance(getattr(self.operator, "local", self.operator), FiniteDifferenceHessianOperator):
            return _with_product_error(self, options, initial_vectors)
        return solve(self.operator, options, initial_vectors=initial_vectors)


def eigenproblem(problem: Problem, curvature: MatrixChoice, block: str | None = None) -> Eigenproblem:
    """The operator of all parameters, or of one block.

    Cost: the operator's graphs and, for the empirical Fisher of at most 1000 rows, the Grams of all blocks once a probe; for
    Kronecker factors the pass that gives them.
    """
    names = None if block is None else problem.blocks[block]
    if callable(curvature.operator):
        return _users(problem, curvature, curvature.operator(problem, names))
    match curvature.operator:
        case "hessian":
            operator: Operator = problem.hessian(names)
        case "finite_difference_hessian":
            operator = problem.finite_difference_hessian(names)
        case "ggn":
            ggn = problem.ggn(names)
            return Eigenproblem(operator=ggn, about={"num_targets": ggn.num_targets})
        case "empirical_fisher":
            return _empirical_fisher(problem, curvature, block)
        case "sampled_fisher":
            sampled = problem.sampled_fisher(names, sample_unit=curvature.sample_unit, num_draws=curvature.num_draws)
            return Eigenproblem(operator=sampled, about=_rows_of(sampled, "sampled"))
        case "preconditioned_hessian":
            operator = problem.preconditioned_hessian(names)
        case "kfac" | "ekfac":
            return _kronecker(problem, curvature, names)
    return Eigenproblem(operator=operator)


def measured_blocks(problem: Problem, curvature: MatrixChoice) -> list[str]:
    """The blocks that have an operator: factors are of whole layers, not of every one, and an optimizer may not move all."""
    if curvature.is_kronecker:
        layers = problem.grams.kronecker(curvature.fisher_type, sharing=curvature.sharing).values()
        members = [{layer.weight} | ({layer.bias} if layer.bias else set()) for layer in layers]
    elif curvature.needs_optimizer:
        members = [{name} for name in problem.stability().names]
    else:
        return list(problem.blocks)
    return [block for block, names in problem.blocks.items() if _whole_members(members, set(names))]


def _whole_members(members: Sequence[Set[str]], names: Set[str]) -> bool:
    """Whether some of them are among the names, none in part: `A x G` has no block for a weight without its bias."""
    touched = [one for one in members if not one.isdisjoint(names)]
    return bool(touched) and all(one <= names for one in touched)


def _empirical_fisher(problem: Problem, curvature: MatrixChoice, block: str | None) -> Eigenproblem:
    names = None if block is None else problem.blocks[block]
    if curvature.sample_unit == "token" or problem.objective.is_sharded or problem.num_rows > _MAX_GRAM_SAMPLES:
        operator = problem.empirical_fisher(names, sample_unit=curvature.sample_unit)
        return Eigenproblem(operator=operator, about=_rows_of(operator, "empirical"))
    grams = problem.grams().grams  # before the operator's graphs take their memory
    operator = problem.empirical_fisher(names)
    whole = reduce(torch.add, grams.values()) if block is None else grams[block]
    rows = operator.rows.to(whole.device)
    gram = whole[rows][:, rows]
    if not gram.isfinite().all():
        raise ProbeError("a row of this probe has a finite gradient in this block and one that is not finite in another.")
    return Eigenproblem(operator=operator, gram=gram, about=_rows_of(operator, "empirical"))


def _kronecker(problem: Problem, curvature: MatrixChoice, names: Iterable[str] | None) -> Eigenproblem:
    operator = problem.kfac(
        names, kind=curvature.fisher_type, sharing=curvature.sharing, corrected=curvature.operator == "ekfac"
    )
    return Eigenproblem(operator=operator, about={"uncovered": list(operator.uncovered)})


def _users(problem: Problem, curvature: MatrixChoice, operator: object) -> Eigenproblem:
    if not isinstance(operator, Operator):
        raise ConfigurationError(
            f"`operator` {curvature.label!r} must give an operator (shape, dtype, device, is_psd, matmat), got {operator!r}."
        )
    if problem.world.size > 1 and not hasattr(operator, "space"):
        raise ConfigurationError(
            f"`operator` {curvature.label!r} needs an attribute `space` in a run of several processes: that of the operator it "
            "is made of, or `LocalSpace()` of `curvature_callbacks.space` where every process has all rows."
        )
    return Eigenproblem(operator=operator)


def _rows_of(operator: FisherOperator | ShardedFisherOperator, fisher: str) -> dict[str, Any]:
    return {
        "fisher": fisher,
        "sample_unit": operator.sample_unit,
        "num_samples": operator.num_samples,
        "num_targets": operator.num_targets,
    }


def _with_product_error(task: Eigenproblem, options: LanczosOptions, initial_vectors: Tensor | None) -> Eigenpairs:
    """The pairs, and how far two steps of the differences are apart along the outermost of them."""
    pairs = solve(task.operator, replace(options, return_eigenvectors=True), initial_vectors=initial_vectors)
    assert pairs.eigenvectors is not None
    outermost = {0, pairs.eigenvectors.shape[1] - 1}
    error = max(_product_error(task.operator, pairs.eigenvectors[:, column].contiguous()) for column in outermost)
    vectors = pairs.eigenvectors if options.return_eigenvectors else None
    spent = _DIFFERENCE_PRODUCTS * len(outermost)
    return replace(pairs, eigenvectors=vectors, product_error=error, num_matvecs=pairs.num_matvecs + spent)


def _product_error(operator: Operator, v: Tensor) -> float:
    if isinstance(operator, ReplicatedOperator):
        whole = InnerProducts(operator).assembled(v)
        return operator.checked(lambda local: (_product_error(local, whole), 0))[0]
    assert isinstance(operator, FiniteDifferenceHessianOperator)
    return operator.error_estimate(v)
