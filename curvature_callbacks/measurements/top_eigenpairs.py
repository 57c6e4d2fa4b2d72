"""Outer eigenpairs of the Hessian, with residuals and negative curvature."""

from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

from torch import nn

from curvature_callbacks.errors import ConfigurationError, check_choice, check_positive
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos import Which, lanczos
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.linalg.symmetry import check_symmetric
from curvature_callbacks.measurements.base import offline_problem
from curvature_callbacks.model.isolation import isolated
from curvature_callbacks.model.losses import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.operators.second_order import check_second_order
from curvature_callbacks.problem import Problem
from curvature_callbacks.record import Record

OperatorName = Literal["hessian"]

_HEADLINE: Final = (
    "lambda_max",
    "lambda_min",
    "residual_max",
    "num_converged",
    "most_negative_eigenvalue",
    "ritz_negative_mass",
    "ritz_negative_fraction",
)
_CHECK_PRODUCTS: Final = 3  # what the self-check spends


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TopEigenpairs:
    """Outer eigenpairs of the mean loss's Hessian by Lanczos, both ends, each with its residual.

    Tags of the whole model; per block `curvature_hessian_lambda_max/<b>`, and the others over blocks as
    `curvature_hessian_over_blocks/<metric>_{min,median,max}`:

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature/hessian_lambda_max` | largest Ritz value (sharpness) | | small stable learning rate |
    | `curvature/hessian_lambda_min` | smallest Ritz value, an upper bound of the smallest eigenvalue | | |
    | `curvature/hessian_residual_max` | largest `residual / abs(theta)` of the pairs | >= 0 | numbers not to trust |
    | `curvature/hessian_num_converged` | pairs within tolerance | 0..k | |
    | `curvature/hessian_most_negative_eigenvalue` | smallest eigenvalue, at probes where it converged | | |
    | `curvature/hessian_ritz_negative_mass` | negative share of `sum abs(theta)`, converged pairs | 0..1 | a saddle |
    | `curvature/hessian_ritz_negative_fraction` | share of converged pairs that is negative | 0..1 | a saddle |
    | `curvature_hessian/residual_lambda_{max,min}` | absolute residuals of the two ends | >= 0 | |

    The first probe of a run checks that the operator gives the same answer twice, is symmetric and (where the model has
    custom operations) agrees with finite differences, and refuses to go on otherwise: a kernel without a second derivative
    is silently wrong.

    Args:
        operator: `hessian`.
        k: pairs.
        which: `BE` both ends, `LA` largest, `SA` smallest, `LM` largest magnitude.
        tol: a pair has converged when its residual is at most `tol |theta|`.
        max_matvecs: most products to spend a probe (and block).
        per_block: one run for each block's own diagonal block of the Hessian as well as for the whole model.

    Cost: 2 gradients and 2.1 to 2.8 a product, at most `max_matvecs` of them; memory `max_matvecs + 1` vectors of size P.
    """

    operator: OperatorName = "hessian"
    k: int = 4
    which: Which = "BE"
    tol: float = 1e-2
    max_matvecs: int = 30
    per_block: bool = False

    def __post_init__(self) -> None:
        check_choice("operator", self.operator, get_args(OperatorName))
        check_choice("which", self.which, get_args(Which))
        check_positive("k", self.k)
        if self.max_matvecs < self.k:
            raise ConfigurationError(f"`max_matvecs` must be at least `k`={self.k}, got {self.max_matvecs}.")
        if not self.tol > 0:
            raise ConfigurationError(f"`tol` must be positive, got {self.tol!r}.")

    @property
    def name(self) -> str:
        """The operator's name."""
        return self.operator

    def init(self, problem: Problem) -> None:
        """None: the self-check has not run."""

    def measure(self, problem: Problem, state: float | None) -> tuple[list[Record], float | None]:
        """One record for the whole model, and one a block if asked; the state is the error the self-check measured."""
        whole = problem.hessian()
        first = state is None
        if state is None:
            state = check_second_order(whole, seed=problem.seed)
        records = [self._record(problem, whole, None, state, _CHECK_PRODUCTS if first else 0)]
        del whole  # its graph, before the blocks build theirs
        if self.per_block:
            records += [
                self._record(problem, problem.hessian(names), block, state, 0) for block, names in problem.blocks.items()
            ]
        return records, state

    def _record(self, problem: Problem, operator: Operator, block: str | None, asymmetry: float, extra_products: int) -> Record:
        pairs = lanczos(operator, k=self.k, which=self.which, tol=self.tol, max_matvecs=self.max_matvecs, seed=problem.seed)
        return Record(
            step=problem.step,
            measurement=self.name,
            block=block,
            scalars=pairs.metrics(),
            headline=_HEADLINE,
            arrays={
                "eigenvalues": pairs.eigenvalues.tolist(),
                "residuals": pairs.residuals.tolist(),
                "converged": pairs.converged.double().tolist(),
            },
            num_matvecs=pairs.num_matvecs + extra_products,
            metadata={
                "which": self.which,
                "tol": self.tol,
                "reorth_mode": pairs.reorth_mode,
                "dtype": str(operator.dtype).removeprefix("torch."),
                "seed": problem.seed,
                "asymmetry": max(asymmetry, pairs.asymmetry),
                "warnings": list(pairs.warnings),
            },
        )


def compute_spectrum(
    model: nn.Module,
    batches: Any,
    *,
    operator: OperatorName | Operator = "hessian",
    loss: Loss = None,
    params_filter: ParamsFilter | None = None,
    k: int = 10,
    which: Which = "BE",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    seed: int = 0,
    return_eigenvectors: bool = False,
    true_residuals: bool = False,
) -> Eigenpairs:
    """Outer eigenpairs of the Hessian of the mean loss `L = sum_i l_i / sum_i n_i`, each with its residual.

    Args:
        model: the module; left as found.
        batches: a microbatch or a list of them, see `compute_fisher_spectrum`.
        operator: `hessian`, or any operator object (its products run isolated from `model`; `batches`, `loss` and
            `params_filter` are not used).
        loss: see `compute_fisher_spectrum`.
        params_filter: `(name, parameter) -> bool`; the Hessian's diagonal block of these parameters.
        k: pairs.
        which: `BE` both ends, `LA` largest, `SA` smallest, `LM` largest magnitude.
        tol: relative tolerance of the residuals, each by its own eigenvalue.
        max_matvecs: most products to spend; default `max(100, 2 k + 20)`.
        seed: seed of the start vector.
        return_eigenvectors: also return the vectors (P, k), entries in the order of `model.named_parameters()`.
        true_residuals: compute `||A v - theta v||_2` rather than estimate it, at k more products.

    Returns:
        The pairs, eigenvalues descending.

    Raises:
        ConfigurationError: a bad choice, an undeterminable loss, no trainable parameter, no valid target.
        RefusedError: a kernel in the model cannot be differentiated twice.

    Cost: 2 gradients, three products for the self-check, then 2.1 to 2.8 gradients a product on transformers; memory
    `max_matvecs + 1` vectors of size P and about 2.5 times a gradient's activations.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
        >>> pairs = compute_spectrum(model, (x, y), loss="mse", k=1, which="LA")
        >>> torch.allclose(pairs.eigenvalues[0], torch.linalg.eigvalsh(2 * x.T @ x / 16)[-1])
        True
    """
    options: dict[str, Any] = {
        "k": k,
        "which": which,
        "tol": tol,
        "max_matvecs": max_matvecs,
        "seed": seed,
        "return_eigenvectors": return_eigenvectors,
        "true_residuals": true_residuals,
    }
    if not isinstance(operator, str):
        if not isinstance(operator, Operator):
            raise ConfigurationError("`operator` must be 'hessian' or have shape, dtype, device, is_psd and matmat.")
        with isolated(model, seed=seed):
            check_symmetric(operator, seed=seed)
            return lanczos(operator, **options)
    check_choice("operator", operator, get_args(OperatorName))
    with offline_problem(model, batches, loss=loss, params_filter=params_filter, seed=seed) as problem:
        hessian = problem.hessian()
        check_second_order(hessian, seed=seed)
        return lanczos(hessian, **options)
