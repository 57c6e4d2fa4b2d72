"""Outer eigenpairs of the Hessian or the empirical Fisher, with residuals and negative curvature."""

from dataclasses import dataclass
from typing import Final, final

from curvature_callbacks.linalg.lanczos import Which
from curvature_callbacks.measurements.eigenproblem import (
    Eigenproblem,
    OperatorName,
    check_operator,
    check_options,
    eigenproblem,
    measurement_name,
)
from curvature_callbacks.model.surrogates import SampleUnit
from curvature_callbacks.problem import Problem
from curvature_callbacks.record import Record

_HEADLINE: Final = (
    "lambda_max",
    "lambda_min",
    "residual_max",
    "num_converged",
    "most_negative_eigenvalue",
    "ritz_negative_mass",
    "ritz_negative_fraction",
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TopEigenpairs:
    """Outer eigenpairs of the mean loss's Hessian by Lanczos, or of the empirical Fisher, each with its residual.

    Tags of the Hessian's run on the whole model; per block `curvature_hessian_lambda_max/<b>`, and the others over blocks as
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

    The empirical Fisher has no negative eigenvalue; the first four of its own (`empirical_fisher_token_eigenpairs` in their
    place for `sample_unit="token"`; beside `FisherSpectrum` in one run nothing is mistaken):

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature/empirical_fisher_eigenpairs_<metric>` | as above | | |
    | `curvature_empirical_fisher_eigenpairs/residual_lambda_{max,min}` | as above | >= 0 | |
    | `curvature_empirical_fisher_eigenpairs_lambda_max/<b>` | largest eigenvalue of a block, with `per_block` | >= 0 | |
    | `curvature_empirical_fisher_eigenpairs_over_blocks/<metric>_{min,median,max}` | the others, with `per_block` | | |

    Of at most 1000 rows the Fisher's pairs come from the Gram, with true residuals; of more, and of tokens, from Lanczos. With
    fewer samples than parameters its smallest eigenvalues are zero: `which="LA"` spends all k on the top.

    The first probe of a run checks the products and refuses to go on where they are wrong, because a kernel without a second
    derivative is silently wrong: the Hessian's for the same answer twice, symmetry and (where the model has custom operations)
    agreement with finite differences; the Fisher's for the same answer twice and `J v` against `J' u`.

    Args:
        operator: `hessian`, or `empirical_fisher`: `(1/N) sum_i g_i g_i'`.
        sample_unit: of the Fisher: `sequence` (`g_i` of a row's loss summed over its targets) or `token` (of a single target's
            loss, over the number of targets, exact).
        k: pairs.
        which: `BE` both ends, `LA` largest, `SA` smallest, `LM` largest magnitude.
        tol: a pair has converged when its residual is at most `tol |theta|`.
        max_matvecs: most products Lanczos may spend a probe (and block).
        per_block: one run for each block's own diagonal block of the operator as well as for the whole model.

    Cost: 2 gradients and 2.1 to 2.8 a product of the Hessian (1.4 to 1.6 of the Fisher), at most `max_matvecs` of them; memory
    `max_matvecs + 1` vectors of size P. From the Gram: `compute_fisher_spectrum`'s, shared with `FisherSpectrum`, and one and
    a half to two and a half products a pair; memory k vectors.
    """

    operator: OperatorName = "hessian"
    sample_unit: SampleUnit = "sequence"
    k: int = 4
    which: Which = "BE"
    tol: float = 1e-2
    max_matvecs: int = 30
    per_block: bool = False

    def __post_init__(self) -> None:
        check_operator(self.operator, self.sample_unit)
        check_options(k=self.k, which=self.which, tol=self.tol, max_matvecs=self.max_matvecs)

    @property
    def name(self) -> str:
        """`hessian`, `empirical_fisher_eigenpairs` or `empirical_fisher_token_eigenpairs`."""
        return measurement_name(self.operator, self.sample_unit)

    def init(self, problem: Problem) -> None:
        """None: the self-check has not run."""

    def measure(self, problem: Problem, state: float | None) -> tuple[list[Record], float | None]:
        """One record for the whole model, and one a block if asked; the state is the error the self-check measured."""
        whole, spent = self._eigenproblem(problem), 0
        if state is None:
            state, spent = whole.check(seed=problem.seed)
        records = [self._record(problem, whole, None, state, spent)]
        del whole  # its graph, before the blocks build theirs
        if self.per_block:
            records += [self._record(problem, self._eigenproblem(problem, block), block, state, 0) for block in problem.blocks]
        return records, state

    def _eigenproblem(self, problem: Problem, block: str | None = None) -> Eigenproblem:
        return eigenproblem(problem, self.operator, block, sample_unit=self.sample_unit)

    def _record(self, problem: Problem, task: Eigenproblem, block: str | None, asymmetry: float, extra_products: int) -> Record:
        pairs = task.solve(k=self.k, which=self.which, tol=self.tol, max_matvecs=self.max_matvecs, seed=problem.seed)
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
                "dtype": str(task.operator.dtype).removeprefix("torch."),
                "seed": problem.seed,
                "asymmetry": max(asymmetry, pairs.asymmetry),
                "warnings": list(pairs.warnings),
                **task.metadata(),
            },
        )
