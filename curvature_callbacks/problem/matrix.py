"""The table of matrices: what each is built by, and what it asks of a run. A new one is its operator and a row here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from types import MappingProxyType
from typing import Any, Final, Literal, final

import torch

from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.loss.fisher_type import Fisher, FisherType
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.problem.eigenproblem import Eigenproblem
from curvature_callbacks.problem.operators import AnyFisher
from curvature_callbacks.problem.problem import Problem

OperatorName = Literal[
    "hessian",
    "ggn",
    "empirical_fisher",
    "sampled_fisher",
    "kfac",
    "ekfac",
    "preconditioned_hessian",
    "finite_difference_hessian",
]
OperatorFunction = Callable[[Problem, tuple[str, ...] | None], Operator]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRequest:
    """A matrix of one probe, as a row of the table builds it.

    Attributes:
        problem: the probe's.
        block: whose diagonal block is wanted; None for that of all parameters.
        fisher_type: which Fisher, and of what; the empirical one for matrices that are none.
        sharing: how positions enter Kronecker factors.
    """

    problem: Problem
    block: str | None
    fisher_type: FisherType
    sharing: Sharing

    @property
    def names(self) -> tuple[str, ...] | None:
        """The block's parameters; None for all."""
        return None if self.block is None else self.problem.blocks[self.block]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A row of the table.

    Attributes:
        build: the operator, with what records say about it.
        options: names of the options of `MatrixChoice` that say something about it.
        fisher: where the labels of a Fisher come from, unless an option says so.
        of_samples: whether it is made of gradients of samples, for which the loss must be known sample by sample. Such a matrix
            has a measurement of its own (`FisherSpectrum`, `KFACQuality`) that bears its name.
        needs_likelihood: whether the loss must tell its logits and likelihood.
        needs_optimizer: whether it is read from the optimizer's state.
        is_kronecker: whether it is made of Kronecker factors, which do not cover every parameter.
        is_coarse: whether its products are too coarse for negative eigenvalues of a model that is stored in half precision.
    """

    build: Callable[[MatrixRequest], Eigenproblem]
    options: tuple[str, ...] = ()
    fisher: Fisher = "empirical"
    of_samples: bool = False
    needs_likelihood: bool = False
    needs_optimizer: bool = False
    is_kronecker: bool = False
    is_coarse: bool = False


def from_function(function: OperatorFunction) -> Callable[[MatrixRequest], Eigenproblem]:
    """Builds what a function of the probe and of parameter names gives; records say nothing more about it."""
    return lambda request: Eigenproblem(operator=function(request.problem, request.names))


def _of_trained_loss(function: OperatorFunction) -> Callable[[MatrixRequest], Eigenproblem]:
    """Builds what a function gives of the loss that trains; records say of which batches."""

    def build(request: MatrixRequest) -> Eigenproblem:
        operator = function(request.problem, request.names)
        return Eigenproblem(operator=operator, about=request.problem.trained.take().about)

    return build


def _ggn(request: MatrixRequest) -> Eigenproblem:
    operator = request.problem.ggn(request.names)
    about = {**request.problem.trained.take().about, "num_targets": operator.num_targets}
    return Eigenproblem(operator=operator, about=about)


def _empirical_fisher(request: MatrixRequest) -> Eigenproblem:
    """Cost: the operator's graphs and, where its pairs come from the Gram, the Grams of all blocks once a probe."""
    problem, unit = request.problem, request.fisher_type.sample_unit
    if unit == "token" or problem.objective.is_sharded or problem.num_rows > problem.max_gram_rows:
        return _fisher(request, problem.empirical_fisher(request.names, sample_unit=unit))
    grams = problem.grams().grams  # before the operator's graphs take their memory
    gram = reduce(torch.add, grams.values()) if request.block is None else grams[request.block]
    return _fisher(request, problem.empirical_fisher(request.names, gram=gram))


def _sampled_fisher(request: MatrixRequest) -> Eigenproblem:
    unit, num_draws = request.fisher_type.sample_unit, request.fisher_type.num_draws
    return _fisher(request, request.problem.sampled_fisher(request.names, sample_unit=unit, num_draws=num_draws))


def _fisher(request: MatrixRequest, operator: AnyFisher) -> Eigenproblem:
    about: dict[str, Any] = {
        "fisher": request.fisher_type.fisher,
        "sample_unit": operator.sample_unit,
        "num_samples": operator.num_samples,
        "num_targets": operator.num_targets,
    }
    return Eigenproblem(operator=operator, about=about)


def _kronecker(request: MatrixRequest, *, corrected: bool) -> Eigenproblem:
    """Cost: the pass that gives the factors, once a probe."""
    operator = request.problem.kfac(
        request.names, fisher_type=request.fisher_type, sharing=request.sharing, corrected=corrected
    )
    return Eigenproblem(operator=operator, about={"uncovered": list(operator.uncovered)})


MATRICES: Final[Mapping[OperatorName, Matrix]] = MappingProxyType(
    {
        "hessian": Matrix(build=_of_trained_loss(Problem.hessian)),
        "ggn": Matrix(build=_ggn, needs_likelihood=True),
        "empirical_fisher": Matrix(build=_empirical_fisher, options=("sample_unit",), of_samples=True),
        "sampled_fisher": Matrix(
            build=_sampled_fisher, options=("sample_unit", "num_draws"), fisher="sampled", of_samples=True
        ),
        "kfac": Matrix(
            build=partial(_kronecker, corrected=False),
            options=("fisher", "sharing", "num_draws"),
            of_samples=True,
            is_kronecker=True,
        ),
        "ekfac": Matrix(
            build=partial(_kronecker, corrected=True),
            options=("fisher", "sharing", "num_draws"),
            of_samples=True,
            is_kronecker=True,
        ),
        "preconditioned_hessian": Matrix(build=_of_trained_loss(Problem.preconditioned_hessian), needs_optimizer=True),
        "finite_difference_hessian": Matrix(build=_of_trained_loss(Problem.finite_difference_hessian), is_coarse=True),
    }
)
