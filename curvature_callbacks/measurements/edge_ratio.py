"""How close the optimizer is to the edge of stability."""

from dataclasses import dataclass, replace
from typing import Any, Final, final

from torch import Tensor

from curvature_callbacks.batches import dtype_name
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import solve
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.stability import Stability
from curvature_callbacks.operators.preconditioned import PreconditionedOperator
from curvature_callbacks.problem.eigenproblem import Eigenproblem
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import Record

_HEADLINE: Final = ("ratio", "limit", "learning_rate")

EdgeRatioState = tuple[float, Tensor | None]  # error of the self-check; (P,) on the host, the eigenvector of the previous probe


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeRatio:
    """Curvature over the most that the optimizer's next step is stable at: above 1 some direction grows from step to step.

    `ratio = lambda_max(T^1/2 (H + C) T^1/2)`, H the Hessian of the mean loss, `T_i = 1 / (limit_i P_i)` with the learning rate,
    momentum, preconditioner P and decoupled weight decay of parameter i, C the weight decay that is a part of the gradient:
    with one parameter group `lambda_max(P^-1/2 (H + C) P^-1/2) / limit`. With learning rate eta, momentum mu, weight decay w:

    | optimizer | P | limit |
    | --- | --- | --- |
    | SGD, with momentum and dampening tau | 1 | `(2 + 2 mu) / (eta (1 - tau))` |
    | SGD with Nesterov momentum | 1 | `(2 + 2 mu) / (eta (1 + 2 mu))` |
    | Adam, also amsgrad | `(1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps)` | `(2 + 2 beta1) / (eta (1 - beta1))` |
    | AdamW | as Adam | `(2 - eta w) (1 + beta1) / (eta (1 - beta1))` |
    | RMSprop, also centered | `sqrt(v) + eps`, `sqrt(v - g^2) + eps` | `(2 + 2 mu) / eta` |

    Tags:

    | tag | meaning | range | high means |
    | --- | --- | --- | --- |
    | `curvature/edge_ratio` | the ratio | | 1 is the edge: full-batch training hovers there, above it oscillates |
    | `curvature/edge_limit` | the limit, where it is the same for all groups | > 0 | sharp minima are stable |
    | `curvature/edge_learning_rate` | of the first group, as the next step will use it | >= 0 | |
    | `curvature_edge/learning_rate_{min,max}` | over groups, where they differ | >= 0 | |
    | `curvature_edge/lambda_max` | `lambda_max(H + C)`, where there is no P and one limit | | small stable learning rate |
    | `curvature_edge/preconditioned_lambda_max` | `lambda_max(P^-1/2 (H + C) P^-1/2)`, where there is one limit | | |
    | `curvature_edge/residual` | an eigenvalue lies within this of the ratio | >= 0 | a number not to trust |
    | `curvature_edge/converged` | 1 where the residual is within `tol` of the ratio | 0, 1 | |

    Learning rate and P are the live optimizer's at the time of the probe: the rate is that of the coming step (both callbacks
    measure after the scheduler; in a loop of your own call `monitor.step` after `scheduler.step()`), P that of the latest one.
    Before the first step of an optimizer with a preconditioner, and while every learning rate is 0, the ratio is absent and the
    record's metadata has the `reason`. An optimizer whose update is not known is refused once, with a warning. Parameters in no
    group do not move and are left out. Batch norms are as in training, unless `batch_norm` of the run says otherwise. Assumed
    and unchecked: the loss measured is the one trained (a factor on either is one on the ratio), gradients are not clipped, P
    changes slowly. Of a batch much smaller than the data the ratio is that of its own loss, larger than the full-batch one.

    Args:
        tol: the ratio has converged when its residual is at most `tol` times it.
        max_matvecs: most products a probe may spend. The run starts from the previous probe's eigenvector: at the edge the
            largest eigenvalues lie close together, and a cold start takes most of them.

    Cost: 2 gradients and 1.6 to 2.5 a product of the Hessian, at most `max_matvecs` of them; memory `max_matvecs + 1` vectors
    of size P and 4 more; one on the host between probes.

    References: Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability (2021), 2103.00065;
    Cohen et al., Adaptive gradient methods at the edge of stability (2022), 2207.14484.
    """

    tol: float = 1e-2
    max_matvecs: int = 25

    def __post_init__(self) -> None:
        _ = self.solver  # which checks its options

    @property
    def name(self) -> str:
        """`edge`, how its tags begin."""
        return "edge"

    @property
    def solver(self) -> LanczosOptions:
        """Options of every run; those of one probe add its seed and the time that is left."""
        return LanczosOptions(k=1, which="LA", tol=self.tol, max_matvecs=self.max_matvecs, return_eigenvectors=True)

    @property
    def needs_optimizer(self) -> bool:
        """True: learning rate and preconditioner are the optimizer's."""
        return True

    def init(self, problem: Problem) -> None:
        """None: the first probe runs the operator's self-check, its error and the eigenvector are the state from then on."""

    def measure(self, problem: Problem, state: EdgeRatioState | None) -> tuple[list[Record], EdgeRatioState | None]:
        """One model-wide record; the state is the error the self-check measured, and the eigenvector."""
        stability = problem.stability()
        if stability.scale is None:
            return [_absent(problem, self.name, stability)], state
        task = Eigenproblem(operator=problem.hessian(stability.names))
        known, previous = (None, None) if state is None else state
        error, spent = task.checked_once(known, seed=problem.seed)
        pairs = self._solve(problem, task.operator, stability, task.start(previous))
        assert pairs.eigenvectors is not None
        record = Record(
            step=problem.step,
            measurement=self.name,
            scalars=_scalars(pairs, stability),
            headline=_HEADLINE,
            num_matvecs=pairs.num_matvecs + spent,
            metadata={
                **_about(stability),
                "num_params": task.num_params,
                "tol": self.tol,
                "reorth_mode": pairs.reorth_mode,
                "dtype": dtype_name(task.operator.dtype),
                "seed": problem.seed,
                "asymmetry": max(error, pairs.asymmetry),
                "warnings": list(pairs.warnings),
                **problem.trained.take().about,
            },
        )
        return [record], (error, task.assembled(pairs.eigenvectors[:, 0]))

    def _solve(self, problem: Problem, hessian: Operator, stability: Stability, previous: Tensor | None) -> Eigenpairs:
        assert stability.scale is not None
        part = InnerProducts(hessian).part
        decay = None if stability.decay is None else part(stability.decay)
        return solve(
            PreconditionedOperator(hessian, part(stability.scale), shift=decay),
            replace(self.solver, seed=problem.seed, max_seconds=problem.deadline.seconds_left()),
            initial_vectors=None if previous is None else previous[:, None].to(hessian.device, hessian.dtype),
        )


def _scalars(pairs: Eigenpairs, stability: Stability) -> dict[str, float]:
    ratio = pairs.eigenvalues[0].item()
    scalars = {"ratio": ratio, "residual": pairs.residuals[0].item(), "converged": float(pairs.converged[0])}
    if stability.limit is not None:
        sharpness = "preconditioned_lambda_max" if stability.preconditioned else "lambda_max"
        scalars |= {"limit": stability.limit, sharpness: ratio * stability.limit}
    return scalars | _learning_rates(stability)


def _learning_rates(stability: Stability) -> dict[str, float]:
    rates = stability.learning_rates
    spread = {"learning_rate_min": min(rates), "learning_rate_max": max(rates)} if len(set(rates)) > 1 else {}
    return {"learning_rate": rates[0]} | spread


def _absent(problem: Problem, name: str, stability: Stability) -> Record:
    metadata = {**_about(stability), "reason": stability.reason}
    return Record(
        step=problem.step, measurement=name, scalars=_learning_rates(stability), headline=_HEADLINE, metadata=metadata
    )


def _about(stability: Stability) -> dict[str, Any]:
    return {"optimizers": list(stability.optimizers)}
