"""Curvature: which matrix a measurement looks at, by name or by a function of one's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

import torch

from curvature_callbacks.errors import ConfigurationError, check_choice
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, Fisher, FisherType, SampleUnit
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.model.loss.surrogates import surrogates
from curvature_callbacks.operators.ggn import known_predictive
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

_KRONECKER: Final = ("kfac", "ekfac")
_MEANINGS: Final = {  # option to the operators it says something about
    "sample_unit": ("empirical_fisher", "sampled_fisher"),
    "fisher": _KRONECKER,
    "sharing": _KRONECKER,
    "num_draws": ("sampled_fisher", *_KRONECKER),
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixChoice:
    """Which matrix, of all parameters or of a block.

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
            check_choice("operator", self.operator, get_args(OperatorName))
        elif not getattr(self.operator, "__name__", ""):
            raise ConfigurationError(f"`operator` must be a name or a function with a name, got {self.operator!r}.")
        check_choice("sharing", self.sharing, get_args(Sharing))
        check_choice("sample_unit", self.sample_unit, get_args(SampleUnit))
        check_choice("fisher", self.fisher, get_args(Fisher))
        for option, default in {"sample_unit": "sequence", "fisher": "empirical", "num_draws": 1, "sharing": "expand"}.items():
            value, meant = getattr(self, option), _MEANINGS[option]
            if value != default and self.operator not in meant:
                raise ConfigurationError(
                    f"`{option}`={value!r} has no meaning for `operator`={self.label!r}: leave it out, or ask for one of "
                    f"{', '.join(map(repr, meant))}."
                )
        _ = self.fisher_type  # which checks the number of draws

    @property
    def label(self) -> str:
        """The operator's name."""
        return self.operator if isinstance(self.operator, str) else str(self.operator.__name__)

    @property
    def name(self) -> str:
        """`<operator>` with what tells its kinds apart: `_token`, or the Fisher and sharing of Kronecker factors."""
        if self.is_kronecker:
            return f"{self.label}_{self.fisher}_{self.sharing}"
        return self.label + ("_token" if self.sample_unit == "token" else "")

    @property
    def eigenpairs_name(self) -> str:
        """Of a measurement of its eigenpairs, which is no other measurement's name (`FisherSpectrum`, `KFACQuality`)."""
        taken = self.is_kronecker or self.operator in ("empirical_fisher", "sampled_fisher")
        return f"{self.name}_eigenpairs" if taken else self.name

    @property
    def fisher_type(self) -> FisherType:
        """Of the samples; the empirical one where the operator has none."""
        if self.is_kronecker:
            return FisherType(fisher=self.fisher, num_draws=self.num_draws)
        sampled: Fisher = "sampled" if self.operator == "sampled_fisher" else "empirical"
        return FisherType(fisher=sampled, sample_unit=self.sample_unit, num_draws=self.num_draws)

    @property
    def is_kronecker(self) -> bool:
        """Whether it is made of Kronecker factors, which do not cover every parameter."""
        return self.operator in _KRONECKER

    @property
    def _samples(self) -> bool:
        """Whether it is made of gradients of single samples."""
        return self.operator in (*_MEANINGS["sample_unit"], *_KRONECKER)

    @property
    def needs_optimizer(self) -> bool:
        """Whether it is read from the optimizer's state."""
        return self.operator == "preconditioned_hessian"

    def check(self, problem: Problem, *, negative: bool) -> None:
        """Raise a `ConfigurationError` where the operator cannot be had here.

        Args:
            problem: of a first probe.
            negative: whether negative eigenvalues are asked for.

        Cost: at most one forward pass.
        """
        if self.operator == "finite_difference_hessian" and negative and problem.objective.is_widened:
            raise ConfigurationError(
                "`operator`='finite_difference_hessian' has no digits left for negative eigenvalues of a model stored in "
                "bfloat16 or float16: ask for `which`='LA', use `operator`='hessian', or store the model in float32."
            )
        if self.needs_optimizer and problem.optimizer is None:
            raise ConfigurationError(
                f"`operator`={self.label!r} needs the `optimizer`, got None: pass the one that trains the model."
            )
        samples = self._samples and not (self.is_kronecker and self.fisher_type == EMPIRICAL)  # whose factors any loss has
        if self.operator == "ggn" or samples:
            with torch.no_grad():
                losses = problem.objective(problem.microbatches[0])
            if samples:
                surrogates(self.fisher_type, losses, seed=problem.seed)
            else:
                known_predictive(losses)

    def metadata(self) -> dict[str, Any]:
        """What stands in every record of it."""
        found: dict[str, Any] = {"operator": self.label}
        if self.is_kronecker:
            found |= {"fisher": self.fisher, "sharing": self.sharing, "sample_unit": self.sample_unit}
        if self.num_draws > 1 or self.fisher_type.fisher == "sampled":
            found["num_draws"] = self.num_draws
        return found
