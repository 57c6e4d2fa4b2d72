"""Eigenproblem: an operator asked for by name, how it is checked and which eigensolver takes it."""

from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

import torch
from torch import Tensor

from curvature_callbacks.batches import batch_size
from curvature_callbacks.errors import ConfigurationError, ProbeError, check_choice, check_positive
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.gram_eigenpairs import eigenpairs_of_gram
from curvature_callbacks.linalg.lanczos import Which, lanczos
from curvature_callbacks.model.surrogates import FisherType, SampleUnit
from curvature_callbacks.operators.adjoint import CHECK_PRODUCTS, check_adjoint
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator
from curvature_callbacks.operators.hessian import HessianOperator
from curvature_callbacks.operators.second_order import check_second_order
from curvature_callbacks.problem import Problem

OperatorName = Literal["hessian", "empirical_fisher"]

# The Gram of all rows cost 1.39 gradients where one product with the Fisher cost 1.41: any spectrum for the price of one step
# of Lanczos. Its eigensolve and its N x N products grow as N^3 and N^2; at 1000 rows they were still small.
_MAX_GRAM_SAMPLES: Final = 1000
_SECOND_ORDER_PRODUCTS: Final = 3  # what `check_second_order` spends on a model without custom operations


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Eigenproblem:
    """What outer eigenpairs are wanted of.

    Attributes:
        operator: the operator; its graphs live as long as this.
        gram: (N, N) Gram of the operator's own rows, where its eigenpairs are to come from it; else None.
    """

    operator: HessianOperator | EmpiricalFisherOperator
    gram: Tensor | None

    def check(self, *, seed: int) -> tuple[float, int]:
        """Largest relative error of the operator's self-check, and the products it spent; raises a `RefusedError`."""
        if isinstance(self.operator, HessianOperator):
            return check_second_order(self.operator, seed=seed), _SECOND_ORDER_PRODUCTS
        return check_adjoint(self.operator, seed=seed), CHECK_PRODUCTS

    def solve(
        self,
        *,
        k: int,
        which: Which,
        tol: float,
        max_matvecs: int | None,
        seed: int,
        return_eigenvectors: bool = False,
        true_residuals: bool = False,
    ) -> Eigenpairs:
        """The pairs; see `lanczos` and `eigenpairs_of_gram`, whose residuals are always true ones."""
        if self.gram is not None and isinstance(self.operator, EmpiricalFisherOperator):
            return eigenpairs_of_gram(
                self.gram, self.operator, k=k, which=which, tol=tol, seed=seed, return_eigenvectors=return_eigenvectors
            )
        return lanczos(
            self.operator,
            k=k,
            which=which,
            tol=tol,
            max_matvecs=max_matvecs,
            seed=seed,
            return_eigenvectors=return_eigenvectors,
            true_residuals=true_residuals,
        )

    def metadata(self) -> dict[str, Any]:
        """What the Fisher is made of."""
        if isinstance(self.operator, HessianOperator):
            return {}
        return {
            "fisher": "empirical",
            "sample_unit": self.operator.sample_unit,
            "num_samples": len(self.operator.rows),
            "num_targets": self.operator.num_targets,
        }


def eigenproblem(
    problem: Problem, name: OperatorName, block: str | None = None, *, sample_unit: SampleUnit = "sequence"
) -> Eigenproblem:
    """The named operator of all parameters, or of one block.

    Cost: the operator's graphs and, for the Fisher of at most 1000 rows, the Grams of all blocks once a probe.
    """
    names = None if block is None else problem.blocks[block]
    if name == "hessian":
        return Eigenproblem(operator=problem.hessian(names), gram=None)
    if sample_unit == "token" or sum(map(batch_size, problem.microbatches)) > _MAX_GRAM_SAMPLES:
        return Eigenproblem(operator=problem.empirical_fisher(names, sample_unit=sample_unit), gram=None)
    grams = problem.block_grams.grams  # before the operator's graphs take their memory
    operator = problem.empirical_fisher(names)
    whole = torch.stack(list(grams.values())).sum(0) if block is None else grams[block]
    rows = operator.rows.to(whole.device)
    gram = whole[rows][:, rows]
    if not gram.isfinite().all():
        raise ProbeError("a row of this probe has a finite gradient in this block and one that is not finite in another.")
    return Eigenproblem(operator=operator, gram=gram)


def measurement_name(operator: OperatorName, sample_unit: SampleUnit) -> str:
    """`hessian`, `empirical_fisher_eigenpairs` or `empirical_fisher_token_eigenpairs`: no other measurement's name."""
    return operator if operator == "hessian" else f"{FisherType(sample_unit=sample_unit).name}_eigenpairs"


def check_operator(operator: str, sample_unit: str) -> None:
    """Raise a `ConfigurationError` unless these name an operator."""
    check_choice("operator", operator, get_args(OperatorName))
    check_choice("sample_unit", sample_unit, get_args(SampleUnit))
    if operator == "hessian" and sample_unit != "sequence":
        raise ConfigurationError(
            f"`sample_unit`={sample_unit!r} has no meaning for `operator`='hessian': the Hessian is that of the mean over all "
            "valid targets. Leave it out, or ask for 'empirical_fisher'."
        )


def check_options(*, k: int, which: str, tol: float, max_matvecs: int | None) -> None:
    """Raise a `ConfigurationError` unless a run can have these."""
    check_choice("which", which, get_args(Which))
    check_positive("k", k)
    if max_matvecs is not None and max_matvecs < k:
        raise ConfigurationError(f"`max_matvecs` must be at least `k`={k}, got {max_matvecs}.")
    if not tol > 0:
        raise ConfigurationError(f"`tol` must be positive, got {tol!r}.")
