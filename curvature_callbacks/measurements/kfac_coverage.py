"""K-FAC coverage: how much of the model has Kronecker factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from curvature_callbacks.errors import ProbeError
from curvature_callbacks.gram.uses.operation import coverage_obstacle
from curvature_callbacks.linalg.accumulate import dot
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import Record


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KFACCoverageReport:
    """Share of the trainable parameters in layers with Kronecker factors `A x G`.

    Such layers are linear, Hugging Face's Conv1D, convolutions without groups, and embeddings (A is diagonal), with their
    biases; a layer called several times counts (its positions are shared), a weight tied between different operations does
    not: the sum of two Kronecker products is not one. A bias counts with its layer, where the weight that it is added beside
    counts or is not trained; beside a parametrised weight (weight norm, spectral norm), which has no factors, it does not.

    Attributes:
        tensors: share by number of parameter tensors, 0..1.
        elements: share by number of elements.
        gradient_energy: share of `||g||^2`, g the gradient of the mean loss over the given batches.
        uncovered: parameter name to the reason.
    """

    tensors: float
    elements: float
    gradient_energy: float
    uncovered: Mapping[str, str]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KFACCoverage:
    """K-FAC coverage by tensors, elements and gradient energy.

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature/kfac_coverage_tensors` | share of the trainable tensors in layers with Kronecker factors | 0..1 | |
    | `curvature/kfac_coverage_elements` | share of the trainable elements | 0..1 | |
    | `curvature/kfac_coverage_gradient_energy` | share of the mean gradient's squared norm | 0..1 | K-FAC sees it |

    The uncovered parameters and why stand in the record's metadata.

    Cost: one gradient, and one forward pass unless `FisherSpectrum` ran at the same probe.
    """

    @property
    def name(self) -> str:
        """`kfac_coverage`, how its tags begin."""
        return "kfac_coverage"

    def init(self, problem: Problem) -> None:
        """None: nothing is carried from probe to probe."""

    def measure(self, problem: Problem, state: None) -> tuple[list[Record], None]:
        """One record of all trainable parameters."""
        report = coverage_of(problem)
        scalars = {"tensors": report.tensors, "elements": report.elements, "gradient_energy": report.gradient_energy}
        record = Record(
            step=problem.step,
            measurement=self.name,
            scalars=scalars,
            metadata={"uncovered": dict(report.uncovered)},
        )
        return [record], None


def uncovered_parameters(problem: Problem) -> dict[str, str]:
    """Name of each trainable parameter outside layers with Kronecker factors, and why.

    Cost: see `ProbeGrams.operations`.
    """
    reasons = {name: coverage_obstacle(name, problem.grams.operations) for name in problem.objective.parameters}
    return {name: reason for name, reason in reasons.items() if reason}


def coverage_of(problem: Problem) -> KFACCoverageReport:
    """Coverage by tensors, elements and gradient energy. Cost: one gradient; and see `uncovered_parameters`."""
    uncovered = uncovered_parameters(problem)
    sizes = {name: float(size) for name, size in problem.objective.sizes.items()}
    total = problem.objective.space.total
    energies = {name: total(dot(g.flatten(), g.flatten())).item() for name, g in problem.gradients.items()}
    if not all(energy < float("inf") for energy in energies.values()):
        raise ProbeError("the gradient of this probe is not finite.")
    return KFACCoverageReport(
        tensors=_share(dict.fromkeys(sizes, 1.0), uncovered),
        elements=_share(sizes, uncovered),
        gradient_energy=_share(energies, uncovered),
        uncovered=uncovered,
    )


def _share(weights: Mapping[str, float], uncovered: Mapping[str, str]) -> float:
    total = sum(weights.values())
    return sum(weight for name, weight in weights.items() if name not in uncovered) / total if total > 0 else 0.0
