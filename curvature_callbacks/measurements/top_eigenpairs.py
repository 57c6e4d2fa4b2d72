"""Outer eigenpairs of a curvature matrix, with residuals and negative curvature."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

from torch import Tensor

from curvature_callbacks.batches import dtype_name
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos.options import LanczosOptions, ReorthMode
from curvature_callbacks.linalg.lanczos.wanted import Which
from curvature_callbacks.measurements.of_matrix import OfMatrix
from curvature_callbacks.problem.eigenproblem import Eigenproblem
from curvature_callbacks.problem.problem import Problem
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
_CURVES: Final = ("lambda_max",)
_MODEL_WIDE: Final = ""  # key of all parameters among those of blocks

EigenpairsState = Mapping[
    str, Any
]  # `error` of the self-check; `starts`: (P,) on the host, where the next run of each block starts


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TopEigenpairs(OfMatrix):
    """Outer eigenpairs of a curvature matrix of the mean loss, each with its residual.

    `<m>` is the matrix: `hessian`, `ggn`, `preconditioned_hessian`, `finite_difference_hessian`,
    `empirical_fisher[_token]_eigenpairs`, `sampled_fisher[_token]_eigenpairs`, `[e]kfac_<fisher>_<sharing>_eigenpairs` or the
    name of your function. `compute_spectrum` has their formulas.

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature/<m>_lambda_max` | largest Ritz value (the Hessian's: sharpness) | | small stable learning rate |
    | `curvature/<m>_lambda_min` | smallest Ritz value, an upper bound of the smallest eigenvalue | | |
    | `curvature/<m>_residual_max` | largest `residual / abs(theta)` of the pairs | >= 0 | numbers not to trust |
    | `curvature/<m>_num_converged` | pairs within tolerance | 0..k | |
    | `curvature/<m>_most_negative_eigenvalue` | smallest eigenvalue, at probes where it converged | | |
    | `curvature/<m>_ritz_negative_mass` | negative share of `sum abs(theta)`, converged pairs | 0..1 | a saddle |
    | `curvature/<m>_ritz_negative_fraction` | share of converged pairs that is negative | 0..1 | a saddle |
    | `curvature_<m>/residual_lambda_{max,min}` | absolute residuals of the two ends | >= 0 | |
    | `curvature_<m>/product_error` | of finite differences: how far two steps are apart | >= 0 | too coarse to trust |
    | `curvature_<m>_lambda_max/<b>` | largest Ritz value of a block, with `per_block` | | |
    | `curvature_<m>_over_blocks/<metric>_{min,median,max}` | the others over blocks, with `per_block` | | |

    All but the Hessians and matrices of your own are positive semi-definite and have no negative curvature to report. With
    fewer samples than parameters their smallest eigenvalues are zero: `which="LA"` spends all k on the top.

    Hessians and the GGN are of the loss that trains, with batch norms as in training and whole batches where it couples rows;
    their records say `batch_norm`, `num_rows` N, and then `coupled`, by what, and `batch_size`.

    Of at most 1000 rows the empirical Fisher's pairs come from the Gram, those of Kronecker factors from the factors, both with
    true residuals; all others from Lanczos.

    The first probe of a run checks the products and refuses to go on where they are wrong, because a kernel without a second
    derivative is silently wrong: a Hessian's for the same answer twice, symmetry and (where the model has custom operations)
    agreement with finite differences; a GGN's and a Fisher's for the same answer twice and `J v` against `J' u`; finite
    differences' for the agreement of two steps.

    Args:
        operator: which matrix; or a function of the probe's `Problem` and the names of a block's parameters (None for all) that
            gives an operator, for instance `lambda problem, names: problem.hessian(names)` under a name of its own.
        sample_unit: of the two Fishers: `sequence` (`g_i` of a row's loss summed over its targets) or `token` (of a single
            target's loss, over the number of targets, exact).
        fisher: whose Kronecker factors: `empirical`, `sampled` or `exact`.
        num_draws: label draws a sample, where labels are drawn.
        sharing: how positions enter Kronecker factors: `expand` or `reduce`.
        k: pairs.
        which: `BE` both ends, `LA` largest, `SA` smallest, `LM` largest magnitude.
        tol: a pair has converged when its residual is at most `tol |theta|`.
        max_matvecs: most products Lanczos may spend a probe (and block).
        max_seconds: stop each run at the first look after this time; None for no limit.
        reorth_mode: see `lanczos`; the one that ran is in the metadata.
        warm_start: whether a run starts from the vectors the previous probe found, mixed with noise. Worth it where these still
            point the same way: with `draw="fixed"` and small steps.
        per_block: one run for each block's own diagonal block of the matrix as well as the model-wide one.

    Cost: in gradients, Hessian 2 to build and 1.6 to 2.5 a product; GGN and Fishers 1.5 and 1.1 to 1.3 (2.2 with convolutions);
    finite differences 2 a product; at most `max_matvecs` products. Memory: `max_matvecs + 1` vectors of size P, fewer where
    these do not fit; with `warm_start` k more at the end, and one on the host between probes (with `per_block` one of each
    block too), which checkpoints hold as well. From the Gram: `compute_fisher_spectrum`'s, paid once a probe where
    `FisherSpectrum` takes it too, and one and a half to two and a half products a pair; from factors those of `KFACQuality`,
    paid once as well.
    """

    k: int = 4
    which: Which = "BE"
    tol: float = 1e-2
    max_matvecs: int = 30
    max_seconds: float | None = None
    reorth_mode: ReorthMode = "auto"
    warm_start: bool = True
    per_block: bool = False

    def __post_init__(self) -> None:
        _ = self.curvature, self.solver  # which check their options

    @property
    def name(self) -> str:
        """The matrix, and `_eigenpairs` behind it where another measurement has its name."""
        return self.curvature.eigenpairs_name

    @property
    def solver(self) -> LanczosOptions:
        """Options of every run; those of one probe add its seed and the time that is left."""
        return LanczosOptions(
            k=self.k,
            which=self.which,
            tol=self.tol,
            max_matvecs=self.max_matvecs,
            max_seconds=self.max_seconds,
            reorth_mode=self.reorth_mode,
            return_eigenvectors=self.warm_start,
        )

    def check(self, problem: Problem) -> None:
        """Raise a `ConfigurationError` where the matrix cannot be had in this run."""
        self.curvature.check(problem, negative=self.solver.asks_for_negative)

    def init(self, problem: Problem) -> EigenpairsState | None:
        """None: the first probe runs the operator's self-check and starts from random vectors."""
        return None

    def measure(self, problem: Problem, state: EigenpairsState | None) -> tuple[list[Record], EigenpairsState | None]:
        """One model-wide record, and one a block if asked; the state is what the next probe starts from."""
        absent = self._absent(problem, self.name, _HEADLINE)
        if absent is not None:
            return [absent], state
        run = _Run(measurement=self, problem=problem, previous=state or {})
        records = [run.record(None)]
        if self.per_block:
            records += [run.record(block) for block in self.curvature.blocks(problem)]
        return records, run.state()


@final
@dataclass(slots=True, kw_only=True)
class _Run:
    """One probe of a measurement, block after block."""

    measurement: TopEigenpairs
    problem: Problem
    previous: EigenpairsState
    error: float | None = None
    starts: dict[str, Tensor] = field(default_factory=dict)

    def record(self, block: str | None) -> Record:
        """The record of all parameters (None) or of a block. In the first probe of a run the first call checks the operator."""
        measurement, problem = self.measurement, self.problem
        task = measurement.curvature.eigenproblem(problem, block)
        known = self.previous.get("error") if self.error is None else self.error
        self.error, spent = task.checked_once(known, seed=problem.seed)
        left = problem.deadline.seconds_left(measurement.max_seconds)
        options = replace(measurement.solver, seed=problem.seed, max_seconds=left)
        pairs = task.solve(options, initial_vectors=self._start(task, block))
        if measurement.warm_start and pairs.is_iterative:
            self.starts[block or _MODEL_WIDE] = task.assembled(pairs.starting_vector())
        return Record(
            step=problem.step,
            measurement=measurement.name,
            block=block,
            scalars=pairs.metrics(),
            headline=_HEADLINE,
            curves=_CURVES,
            arrays={
                "eigenvalues": pairs.eigenvalues.tolist(),
                "residuals": pairs.residuals.tolist(),
                "converged": pairs.converged.double().tolist(),
            },
            charts={},  # a few pairs are no spectrum
            num_matvecs=pairs.num_matvecs + spent,
            metadata=self._metadata(task, pairs, self.error),
        )

    def state(self) -> EigenpairsState:
        """What the next probe starts from."""
        return {"error": self.error, "starts": self.starts}

    def _start(self, task: Eigenproblem, block: str | None) -> Tensor | None:
        """(P, 1) the start vector that the previous probe left, None where it left none or one of other parameters."""
        start = task.start((self.previous.get("starts") or {}).get(block or _MODEL_WIDE))
        return None if start is None else start[:, None]

    def _metadata(self, task: Eigenproblem, pairs: Eigenpairs, asymmetry: float) -> dict[str, Any]:
        return {
            **self.measurement.curvature.metadata(),
            "which": pairs.which,
            "tol": pairs.tol,
            "reorth_mode": pairs.reorth_mode,
            "num_params": task.num_params,
            "dtype": dtype_name(task.operator.dtype),
            "seed": self.problem.seed,
            "asymmetry": max(asymmetry, pairs.asymmetry),
            "warnings": list(pairs.warnings),
            **task.about,
        }
