"""Eigenproblem: an operator of one probe, how it is checked and which eigensolver takes it."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, final

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.operators.capabilities import SelfCheck, eigenpairs, self_check
from curvature_callbacks.operators.fisher import FisherOperator
from curvature_callbacks.operators.replicated import ShardedFisherOperator
from curvature_callbacks.problem.matrix import MatrixChoice
from curvature_callbacks.problem.problem import Problem


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Eigenproblem:
    """An operator together with what its self-check and solver need, on every process.

    Attributes:
        operator: the operator; its graphs live as long as this.
        about: what it is made of, for records.
    """

    operator: Operator
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """P, the dimension."""
        return InnerProducts(self.operator).dimension(self.operator.shape[0])

    def assembled(self, part: Tensor) -> Tensor:
        """(P,) on the host: the vector of which the operator holds `part` here."""
        return InnerProducts(self.operator).assembled(part).cpu()

    def start(self, kept: Tensor | None) -> Tensor | None:
        """The part that is held here of a vector that `assembled` gave at an earlier probe.

        None where it was of other parameters, and on all processes where one of them has none (its checkpoint was not read).
        """
        products, num_params = InnerProducts(self.operator), self.num_params
        part = products.part(kept) if kept is not None and len(kept) == num_params else kept
        missing = part is None or len(part) != self.operator.shape[0]
        return None if products.anywhere(missing) else part

    def check(self, *, seed: int) -> SelfCheck:
        """The operator's self-check; raises a `RefusedError` where its products are wrong."""
        return self_check(self.operator, seed)

    def solve(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        """The outer eigenpairs, by the operator's own way where it has one, else by Lanczos."""
        return eigenpairs(self.operator, options, initial_vectors=initial_vectors)


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
    if curvature.sample_unit == "token" or problem.objective.is_sharded or problem.num_rows > problem.max_gram_rows:
        operator = problem.empirical_fisher(names, sample_unit=curvature.sample_unit)
    else:
        grams = problem.grams().grams  # before the operator's graphs take their memory
        gram = reduce(torch.add, grams.values()) if block is None else grams[block]
        operator = problem.empirical_fisher(names, gram=gram)
    return Eigenproblem(operator=operator, about=_rows_of(operator, "empirical"))


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
