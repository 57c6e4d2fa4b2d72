"""The whole spectrum of a curvature matrix by stochastic Lanczos quadrature."""

from dataclasses import dataclass
from typing import Any, Final, final

from curvature_callbacks.batches import dtype_name
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.linalg.density import Density
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.quadrature import check_quadrature, spectral_density
from curvature_callbacks.measurements.of_matrix import OfMatrix
from curvature_callbacks.problem.eigenproblem import Eigenproblem
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import Record

_HEADLINE: Final = ("trace", "effective_rank", "slq_negative_mass")
_DEFLATION_TOL: Final = 1e-2  # a pair this good leaves 1e-4 of its eigenvalue to the quadrature
_DEFLATION_PRODUCTS: Final = 40  # outliers of trained networks took 15 to 35


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralDensity(OfMatrix):
    """Spectral density, trace, norm, effective rank and negative curvature of a curvature matrix over all its eigenvalues.

    Where `TopEigenpairs` sees the ends, this sees the bulk: sums over all P eigenvalues, estimated from random vectors, each
    with a standard error over these (see `spectral_density`). `<m>` is the matrix with `_density` behind it, such as
    `hessian_density`, `ggn_density`, `empirical_fisher_token_density`; positive semi-definite ones have no negative tags:

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature/<m>_trace` | sum of the eigenvalues | | |
    | `curvature/<m>_effective_rank` | exp of the entropy of `abs(lambda) / sum abs(lambda)` | 1..P | curvature is spread |
    | `curvature/<m>_slq_negative_mass` | `sum abs(lambda < 0) / sum abs(lambda)` | 0..1 | a saddle |
    | `curvature_<m>/frobenius_norm` | `sqrt(sum lambda^2)` | >= 0 | |
    | `curvature_<m>/slq_negative_fraction` | share of eigenvalues below `-1e-3 max abs(lambda)` | 0..1 | a saddle |
    | `curvature_<m>/<metric>_standard_error` | of each of these | >= 0 | more probes are needed |
    | `curvature_<m>/product_error` | of finite differences, with `deflate`: see `TopEigenpairs` | >= 0 | too coarse to trust |
    | `curvature_<m>/density` | figure in TensorBoard: density against eigenvalue, two standard errors as a band | | |

    A standard error does not hold the bias of few steps: below 20 steps small negative masses are missed; at 40 they are off by
    0.011 at most. Arrays: `grid`, `density`, `density_standard_error`.

    The first probe of a run checks the products as in `TopEigenpairs`.

    Args:
        operator: which matrix, with the four options below as in `TopEigenpairs`.
        sample_unit: of the two Fishers: `sequence` or `token`.
        fisher: whose Kronecker factors.
        num_draws: label draws a sample, where labels are drawn.
        sharing: how positions enter Kronecker factors.
        num_probes: random vectors, at least two.
        num_steps: Lanczos steps a probe.
        deflate: eigenpairs of largest magnitude that are found first and enter exactly, 0 for none: outliers make up most of
            the standard errors.

    Cost: that of building the operator and `num_probes * num_steps` of its products, up to 40 more (4 a pair, if that is more)
    to deflate: with the defaults about 300 gradients for the Hessian, so measure rarely. Memory: `num_steps + 1` vectors of
    size P (41 to deflate), and the deflated ones.
    """

    num_probes: int = 4
    num_steps: int = 30
    deflate: int = 4

    def __post_init__(self) -> None:
        _ = self.curvature  # which checks its options
        check_quadrature(num_probes=self.num_probes, num_steps=self.num_steps)
        if isinstance(self.deflate, bool) or not isinstance(self.deflate, int) or self.deflate < 0:
            raise ConfigurationError(f"`deflate` must be a number of eigenpairs, 0 for none, got {self.deflate!r}.")

    @property
    def name(self) -> str:
        """`<operator>[_token]_density`, how its tags begin."""
        return f"{self.curvature.name}_density"

    def check(self, problem: Problem) -> None:
        """Raise a `ConfigurationError` where the matrix cannot be had in this run."""
        self.curvature.check(problem, negative=True)

    def init(self, problem: Problem) -> None:
        """None: the first probe runs the operator's self-check, and its error is the state from then on."""

    def measure(self, problem: Problem, state: float | None) -> tuple[list[Record], float | None]:
        """One model-wide record; the state is the error the self-check measured."""
        absent = self._absent(problem, self.name, _HEADLINE)
        if absent is not None:
            return [absent], state
        task = self.curvature.eigenproblem(problem)
        error, spent = task.checked_once(state, seed=problem.seed)
        outer = self._outer(task, problem.seed)
        density = spectral_density(
            task.operator, num_probes=self.num_probes, num_steps=self.num_steps, seed=problem.seed, deflate=outer
        )
        coarse = {"product_error": outer.product_error} if outer is not None and outer.product_error > 0 else {}
        record = Record(
            step=problem.step,
            measurement=self.name,
            scalars=density.metrics() | coarse,
            headline=_HEADLINE,
            arrays={
                "grid": density.grid.tolist(),
                "density": density.density.tolist(),
                "density_standard_error": density.density_standard_error.tolist(),
            },
            charts={"density": "density"},
            num_matvecs=density.num_matvecs + spent + (outer.num_matvecs if outer is not None else 0),
            metadata=self._metadata(problem, task, density, error),
        )
        return [record], error

    def _outer(self, task: Eigenproblem, seed: int) -> Eigenpairs | None:
        if self.deflate == 0:
            return None
        most = max(_DEFLATION_PRODUCTS, 4 * self.deflate)
        return task.solve(
            LanczosOptions(
                k=self.deflate, which="LM", tol=_DEFLATION_TOL, max_matvecs=most, seed=seed, return_eigenvectors=True
            )
        )

    def _metadata(self, problem: Problem, task: Eigenproblem, density: Density, asymmetry: float) -> dict[str, Any]:
        return {
            **self.curvature.metadata(),
            "num_probes": density.num_probes,
            "num_steps": density.num_steps,
            "num_deflated": density.num_deflated,
            "num_params": task.num_params,
            "width": density.width,
            "lambda_abs_max": density.lambda_abs_max,
            "dtype": dtype_name(task.operator.dtype),
            "seed": problem.seed,
            "asymmetry": asymmetry,
            **task.about,
        }
