"""Which matrix a measurement looks at: a row of the table by name, or a function of the user's."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, final, get_args

import torch

from curvature_callbacks.errors import ConfigurationError, check_choice
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, Fisher, FisherType, SampleUnit
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.model.loss.surrogates import surrogates
from curvature_callbacks.operators.ggn import known_predictive
from curvature_callbacks.problem.eigenproblem import Eigenproblem
from curvature_callbacks.problem.matrix import MATRICES, Matrix, MatrixRequest, OperatorFunction, OperatorName, from_function
from curvature_callbacks.problem.problem import Problem


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixChoice:
    """Which matrix, of all parameters or of a block; what can be known of it stands in its row of `MATRICES`.

    Attributes:
        operator: a name; or a function of the probe and the names of a block's parameters (None: all) that gives an operator,
            which is then called by the function's name.
        sample_unit: of a Fisher: `sequence` or `token`.
        fisher: whose factors K-FAC and EKFAC have.
        num_draws: label draws a sample, where labels are drawn.
        sharing: how positions enter the factors.

    Raises:
        ConfigurationError: a bad choice, or an option that says nothing about this operator.
    """

    operator: OperatorName | OperatorFunction = "hessian"
    sample_unit: SampleUnit = "sequence"
    fisher: Fisher = "empirical"
    num_draws: int = 1
    sharing: Sharing = "expand"

    def __post_init__(self) -> None:
        if not callable(self.operator):
            check_choice("operator", self.operator, MATRICES)
        elif not getattr(self.operator, "__name__", ""):
            raise ConfigurationError(f"`operator` must be a name or a function with a name, got {self.operator!r}.")
        check_choice("sharing", self.sharing, get_args(Sharing))
        check_choice("sample_unit", self.sample_unit, get_args(SampleUnit))
        check_choice("fisher", self.fisher, get_args(Fisher))
        for option, default in {"sample_unit": "sequence", "fisher": "empirical", "num_draws": 1, "sharing": "expand"}.items():
            if getattr(self, option) != default and option not in self.matrix.options:
                meant = [name for name, matrix in MATRICES.items() if option in matrix.options]
                raise ConfigurationError(
                    f"`{option}`={getattr(self, option)!r} has no meaning for `operator`={self.label!r}: leave it out, or ask "
                    f"for one of {', '.join(map(repr, meant))}."
                )
        _ = self.fisher_type  # which checks the number of draws

    @property
    def matrix(self) -> Matrix:
        """Its row of the table, or one made for the function."""
        return Matrix(build=from_function(self.operator)) if callable(self.operator) else MATRICES[self.operator]

    @property
    def label(self) -> str:
        """The operator's name in the table, or that of the function."""
        return self.operator if isinstance(self.operator, str) else str(self.operator.__name__)

    @property
    def name(self) -> str:
        """The label with what tells variants apart: `_token`, or the Fisher and sharing of Kronecker factors."""
        if self.matrix.is_kronecker:
            return f"{self.label}_{self.fisher}_{self.sharing}"
        return self.label + ("_token" if self.sample_unit == "token" else "")

    @property
    def eigenpairs_name(self) -> str:
        """Name of the measurement of its eigenpairs, distinct from `FisherSpectrum`'s and `KFACQuality`'s."""
        return f"{self.name}_eigenpairs" if self.matrix.of_samples else self.name

    @property
    def fisher_type(self) -> FisherType:
        """The type of Fisher the operator stands for; the empirical one where it stands for none."""
        fisher = self.fisher if "fisher" in self.matrix.options else self.matrix.fisher
        return FisherType(fisher=fisher, sample_unit=self.sample_unit, num_draws=self.num_draws)

    def check(self, problem: Problem, *, negative: bool) -> None:
        """Raise a `ConfigurationError` where the run cannot have this matrix.

        Args:
            problem: of a first probe.
            negative: whether negative eigenvalues are asked for.

        Cost: at most one forward pass.
        """
        matrix = self.matrix
        if matrix.is_coarse and negative and problem.objective.is_widened:
            raise ConfigurationError(
                f"`operator`={self.label!r} has no digits left for negative eigenvalues of a model stored in bfloat16 or "
                "float16: ask for `which`='LA', use `operator`='hessian', or store the model in float32."
            )
        if matrix.needs_optimizer and problem.optimizer is None:
            raise ConfigurationError(
                f"`operator`={self.label!r} needs the `optimizer`, got None: pass the one that trains the model."
            )
        any_loss_has_it = matrix.is_kronecker and self.fisher_type == EMPIRICAL
        needs_samples = matrix.of_samples and not any_loss_has_it
        if matrix.needs_likelihood or needs_samples:
            with torch.no_grad():
                losses = problem.objective(problem.microbatches[0])
            if matrix.needs_likelihood:
                known_predictive(losses)
            if needs_samples:
                surrogates(self.fisher_type, losses, seed=problem.seed)

    def eigenproblem(self, problem: Problem, block: str | None = None) -> Eigenproblem:
        """The operator of all parameters, or of one block.

        Raises:
            ConfigurationError: a function gave no operator, or none that works over processes.

        Cost: see the operator; Grams and Kronecker factors are computed once a probe and kept for all its measurements.
        """
        request = MatrixRequest(problem=problem, block=block, fisher_type=self.fisher_type, sharing=self.sharing)
        task = self.matrix.build(request)
        if callable(self.operator):
            self._check_users(task.operator, problem)
        return task

    def blocks(self, problem: Problem) -> list[str]:
        """The blocks that have an operator: factors are of complete layers, and an optimizer may not move every parameter."""
        if self.matrix.is_kronecker:
            layers = problem.grams.kronecker(self.fisher_type, sharing=self.sharing).values()
            members = [{layer.weight} | ({layer.bias} if layer.bias else set()) for layer in layers]
        elif self.matrix.needs_optimizer:
            members = [{name} for name in problem.stability().names]
        else:
            return list(problem.blocks)
        return [block for block, names in problem.blocks.items() if _has_undivided(members, set(names))]

    def metadata(self) -> dict[str, Any]:
        """What stands in every record of it."""
        facts: dict[str, Any] = {"operator": self.label}
        if self.matrix.is_kronecker:
            facts |= {"fisher": self.fisher, "sharing": self.sharing, "sample_unit": self.sample_unit}
        if self.num_draws > 1 or self.fisher_type.fisher == "sampled":
            facts["num_draws"] = self.num_draws
        return facts

    def _check_users(self, operator: object, problem: Problem) -> None:
        if not isinstance(operator, Operator):
            raise ConfigurationError(
                f"`operator` {self.label!r} must give an operator (shape, dtype, device, is_psd, matmat), got {operator!r}."
            )
        if problem.world.size > 1 and not hasattr(operator, "space"):
            raise ConfigurationError(
                f"`operator` {self.label!r} needs an attribute `space` in a run of several processes: that of the operator it "
                "is made of, or `LocalSpace()` of `curvature_callbacks.space` where every process has all rows."
            )


def _has_undivided(members: Sequence[Set[str]], names: Set[str]) -> bool:
    """Whether some of them are among the names, none in part: `A x G` has no block for a weight without its bias."""
    touched = [group for group in members if not group.isdisjoint(names)]
    return bool(touched) and all(group <= names for group in touched)
