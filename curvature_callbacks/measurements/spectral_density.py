"""The whole spectrum of the Hessian or the empirical Fisher by stochastic Lanczos quadrature."""

from dataclasses import dataclass
from typing import Any, Final, final

from curvature_callbacks.linalg.density import Density
from curvature_callbacks.linalg.quadrature import check_quadrature, spectral_density
from curvature_callbacks.measurements.eigenproblem import (
    Eigenproblem,
    OperatorName,
    check_operator,
    eigenproblem,
    measurement_name,
)
from curvature_callbacks.model.surrogates import SampleUnit
from curvature_callbacks.problem import Problem
from curvature_callbacks.record import Record

_HEADLINE: Final = ("trace", "effective_rank", "slq_negative_mass")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralDensity:
    """Spectral density, trace, norm, effective rank and negative curvature of the mean loss's Hessian over all eigenvalues.

    Where `TopEigenpairs` sees the ends, this sees the bulk: sums over all P eigenvalues, estimated from random vectors, each
    with a standard error over these (see `spectral_density`). `<m>` is `hessian_density`, or `empirical_fisher_density`
    (`empirical_fisher_token_density`) without the negative ones:

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature/<m>_trace` | sum of the eigenvalues | | |
    | `curvature/<m>_effective_rank` | exp of the entropy of `abs(lambda) / sum abs(lambda)` | 1..P | curvature is spread |
    | `curvature/<m>_slq_negative_mass` | `sum abs(lambda < 0) / sum abs(lambda)` | 0..1 | a saddle |
    | `curvature_<m>/frobenius_norm` | `sqrt(sum lambda^2)` | >= 0 | |
    | `curvature_<m>/slq_negative_fraction` | share of eigenvalues below `-1e-3 max abs(lambda)` | 0..1 | a saddle |
    | `curvature_<m>/<metric>_standard_error` | of each of these | >= 0 | more probes are needed |
    | `curvature_<m>/density` | figure in TensorBoard: density against eigenvalue, two standard errors as a band | | |

    A standard error does not hold the bias of few steps: below 20 steps small negative masses are missed; at 40 they are off by
    0.011 at most. Arrays: `grid`, `density`, `density_standard_error`.

    The first probe of a run checks the products as in `TopEigenpairs`.

    Args:
        operator: `hessian`, or `empirical_fisher`: `(1/N) sum_i g_i g_i'`.
        sample_unit: of the Fisher: `sequence` or `token`, see `TopEigenpairs`.
        num_probes: random vectors, at least two.
        num_steps: Lanczos steps a probe.

    Cost: 2 gradients and `num_probes * num_steps` products of 2.1 to 2.8 gradients for the Hessian (1.4 to 1.6 for the Fisher):
    with the defaults about 300 gradients, so measure rarely. Memory: `num_steps + 1` vectors of size P.
    """

    operator: OperatorName = "hessian"
    sample_unit: SampleUnit = "sequence"
    num_probes: int = 4
    num_steps: int = 30

    def __post_init__(self) -> None:
        check_operator(self.operator, self.sample_unit)
        check_quadrature(num_probes=self.num_probes, num_steps=self.num_steps)

    @property
    def name(self) -> str:
        """`<operator>[_token]_density`."""
        return measurement_name(self.operator, self.sample_unit).removesuffix("_eigenpairs") + "_density"

    def init(self, problem: Problem) -> None:
        """None: the self-check has not run."""

    def measure(self, problem: Problem, state: float | None) -> tuple[list[Record], float | None]:
        """One record for the whole model; the state is the error the self-check measured."""
        task, spent = eigenproblem(problem, self.operator, sample_unit=self.sample_unit), 0
        if state is None:
            state, spent = task.check(seed=problem.seed)
        found = spectral_density(task.operator, num_probes=self.num_probes, num_steps=self.num_steps, seed=problem.seed)
        record = Record(
            step=problem.step,
            measurement=self.name,
            scalars=found.metrics(),
            headline=_HEADLINE,
            arrays={
                "grid": found.grid.tolist(),
                "density": found.density.tolist(),
                "density_standard_error": found.density_standard_error.tolist(),
            },
            num_matvecs=found.num_matvecs + spent,
            metadata=self._metadata(problem, task, found, state),
        )
        return [record], state

    def _metadata(self, problem: Problem, task: Eigenproblem, found: Density, asymmetry: float) -> dict[str, Any]:
        return {
            "num_probes": found.num_probes,
            "num_steps": found.num_steps,
            "width": found.width,
            "lambda_abs_max": found.lambda_abs_max,
            "dtype": str(task.operator.dtype).removeprefix("torch."),
            "seed": problem.seed,
            "asymmetry": asymmetry,
            **task.metadata(),
        }
