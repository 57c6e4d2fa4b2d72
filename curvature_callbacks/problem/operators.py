"""The operators of a problem, each of the rows of all processes."""

from abc import ABC
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from curvature_callbacks.errors import ProbeError, RefusedError
from curvature_callbacks.gram.probe_grams import ProbeGrams
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.checks import check_second_derivatives
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType, SampleUnit
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.model.stability import Optimizers, Stability
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator, FisherOperator, SampledFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.hessian import HessianOperator
from curvature_callbacks.operators.kfac import KFACOperator
from curvature_callbacks.operators.preconditioned import PreconditionedOperator
from curvature_callbacks.operators.replicated import ReplicatedDifferencesOperator, ReplicatedOperator, ShardedFisherOperator
from curvature_callbacks.problem.preconditioner import stability_of
from curvature_callbacks.problem.targets import num_valid_targets
from curvature_callbacks.problem.trained_loss import TrainedLoss
from curvature_callbacks.processes.world import World

A = TypeVar("A", bound=Operator)
AnyFisher = FisherOperator | ShardedFisherOperator
Names = Iterable[str] | None  # of parameters to differentiate by, default all


class ProblemOperators(ABC):
    """The part of a `Problem` that makes operators.

    Fishers are of `objective` on `microbatches`, row by row; Hessians and the GGN are of `trained`, on whole batches where it
    couples their rows.

    Attributes:
        model: as in `Problem`, with the others that it sets.
    """

    model: nn.Module
    microbatches: Sequence[Microbatch]
    objective: Objective
    trained: TrainedLoss
    grams: ProbeGrams
    optimizer: Optimizers | None
    seed: int
    world: World

    @property
    def num_rows(self) -> int:
        """N, the rows of all microbatches of all processes."""
        return int(self.world.total(torch.tensor(self._own_rows)))

    @property
    def _own_rows(self) -> int:
        return sum(microbatch.num_rows for microbatch in self.microbatches)

    def hessian(self, names: Names = None) -> HessianOperator | ReplicatedOperator:
        """The Hessian of the mean loss, restricted to the named parameters.

        Raises:
            RefusedError: the model's attention has no second derivative.
        """
        check_second_derivatives(self.model)
        whole = self.trained.take()
        with self.world.together():
            local = HessianOperator(whole.objective, whole.microbatches, names)
        return self.over_processes(local, local.num_targets)

    def finite_difference_hessian(self, names: Names = None) -> FiniteDifferenceHessianOperator | ReplicatedDifferencesOperator:
        """The same by differences of the gradient, for models without a second derivative."""
        whole = self.trained.take()
        with self.world.together():
            local = FiniteDifferenceHessianOperator(whole.objective, whole.microbatches, names)
        if self._has_all_rows:
            return local
        return ReplicatedDifferencesOperator(local, self._num_targets, self.world)

    def ggn(self, names: Names = None) -> GGNOperator | ReplicatedOperator:
        """The generalised Gauss-Newton matrix of the mean loss, restricted to the named parameters.

        Raises:
            ConfigurationError: the likelihood of the loss is not known.
            RefusedError: the model's attention has no second derivative, which products with J take as well.
        """
        check_second_derivatives(self.model)
        whole = self.trained.take()
        with self.world.together():
            local = GGNOperator(whole.objective, whole.microbatches, names)
        return self.over_processes(local, local.num_targets)

    def stability(self, names: Names = None) -> Stability:
        """Where the optimizer's next step of the named parameters is stable; see `read_stability`.

        Raises:
            ConfigurationError: the problem has no optimizer, or one of other parameters.
            RefusedError: the optimizer's update is not known.
        """
        named = dict(self.model.named_parameters())
        chosen = {name: named[name] for name in (self.objective.parameters if names is None else names)}
        return stability_of(self.optimizer, chosen, self.objective, self.world)

    def preconditioned_hessian(self, names: Names = None) -> PreconditionedOperator:
        """`P^-1/2 H P^-1/2`, P the preconditioner of the optimizer's latest step; of those named parameters that it moves.

        Raises:
            ConfigurationError, RefusedError: as `stability` and `hessian`.
            ProbeError: none of them moves yet.
        """
        stability = self.stability(names)
        if stability.preconditioner is None:
            raise ProbeError(f"there is no preconditioned Hessian: {stability.reason}")
        hessian = self.hessian(stability.names)
        return PreconditionedOperator(hessian, InnerProducts(hessian).part(1 / stability.preconditioner))

    def empirical_fisher(
        self, names: Names = None, *, sample_unit: SampleUnit = "sequence", gram: Tensor | None = None
    ) -> AnyFisher:
        """The empirical Fisher of all microbatches, restricted to the named parameters.

        `gram` (N, N) of these parameters, over the rows of all processes, is where its eigenpairs are then from.

        Raises:
            ConfigurationError: the losses of single rows (`token`: of single targets) are not known.
            RefusedError: as `ggn`.
        """
        self.trained.refuse_rows()
        check_second_derivatives(self.model)
        with self.world.together():
            local = EmpiricalFisherOperator(
                self.objective,
                self.microbatches,
                names,
                sample_unit=sample_unit,
                gram=gram if self._has_all_rows else None,
            )
        return local if self._has_all_rows else ShardedFisherOperator(local, self._own_rows, self.world, gram=gram)

    def sampled_fisher(self, names: Names = None, *, sample_unit: SampleUnit = "sequence", num_draws: int = 1) -> AnyFisher:
        """The Fisher of labels drawn from the predictive with the probe's seed, restricted to the named parameters.

        Raises:
            ConfigurationError: the likelihood of the loss is not known.
            RefusedError: as `ggn`.
        """
        self.trained.refuse_rows()
        check_second_derivatives(self.model)
        seed = self.world.seed(self.seed)
        with self.world.together():
            local = SampledFisherOperator(
                self.objective, self.microbatches, names, sample_unit=sample_unit, num_draws=num_draws, seed=seed
            )
        return local if self._has_all_rows else ShardedFisherOperator(local, self._own_rows, self.world)

    def kfac(
        self, names: Names = None, *, fisher_type: FisherType = EMPIRICAL, sharing: Sharing, corrected: bool
    ) -> KFACOperator:
        """K-FAC's approximation of a Fisher (EKFAC's where `corrected`), of those named parameters that are covered.

        Raises:
            RefusedError: none of them is.
            ConfigurationError: a weight is named without its bias, or the reverse.
        """
        self.trained.refuse_rows()
        if self.objective.is_sharded:
            raise RefusedError(
                "K-FAC's matrix needs unsharded parameters on every process, and they do not fit: use `KFACQuality`."
            )
        layers = self.grams.kronecker(fisher_type, sharing=sharing)
        return KFACOperator(layers.values(), self.objective.leaves(names), corrected=corrected)

    def over_processes(self, local: A, num_targets: int) -> A | ReplicatedOperator:
        """The operator of all rows, from a process's own of the mean loss over `num_targets` valid targets of its microbatches.

        `local` itself where it has all rows: of one process, and of sharded parameters.
        """
        return local if self._has_all_rows else ReplicatedOperator(local, num_targets, self.world)

    @cached_property
    def _num_targets(self) -> int:
        """Valid targets of this process's whole batches. Cost: one forward pass."""
        whole = self.trained.take()
        with self.world.together():
            return num_valid_targets(whole.objective, whole.microbatches)

    @property
    def _has_all_rows(self) -> bool:
        """Whether an operator of the objective has the rows of all processes."""
        return self.world.size == 1 or self.objective.is_sharded
