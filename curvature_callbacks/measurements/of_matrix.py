"""What measurements of a matrix share: which matrix, and the record of a probe at which there is none."""

from dataclasses import dataclass

from curvature_callbacks.model.loss.fisher_type import Fisher, SampleUnit
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.problem.matrix import OperatorFunction, OperatorName
from curvature_callbacks.problem.matrix_choice import MatrixChoice
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class OfMatrix:
    """A measurement of one matrix of the table, or of one that a function gives; the fields are those of `MatrixChoice`."""

    operator: OperatorName | OperatorFunction = "hessian"
    sample_unit: SampleUnit = "sequence"
    fisher: Fisher = "empirical"
    num_draws: int = 1
    sharing: Sharing = "expand"

    @property
    def curvature(self) -> MatrixChoice:
        """Which matrix: the five fields, checked."""
        return MatrixChoice(
            operator=self.operator,
            sample_unit=self.sample_unit,
            fisher=self.fisher,
            num_draws=self.num_draws,
            sharing=self.sharing,
        )

    @property
    def needs_optimizer(self) -> bool:
        """Whether the matrix is read from the optimizer's state."""
        return self.curvature.matrix.needs_optimizer

    def _absent(self, problem: Problem, name: str, headline: tuple[str, ...]) -> Record | None:
        """The record of a probe at which the optimizer has no preconditioner yet, with the reason; else None."""
        reason = problem.stability().reason if self.needs_optimizer else None
        if reason is None:
            return None
        metadata = {**self.curvature.metadata(), "reason": reason}
        return Record(step=problem.step, measurement=name, headline=headline, metadata=metadata)
