"""Problem: model, blocks, loss and microbatches of one probe; what measurements share is built once."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, TypeVar, final

import torch
from torch import Tensor, nn

from curvature_callbacks.batches import batch_size
from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError
from curvature_callbacks.gram.context import GramContext
from curvature_callbacks.gram.probe_grams import ProbeGrams
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.checks import check_model, check_second_derivatives
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType, SampleUnit
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers, Stability
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator, FisherOperator, SampledFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.hessian import HessianOperator
from curvature_callbacks.operators.kfac import KFACOperator
from curvature_callbacks.operators.preconditioned import PreconditionedOperator
from curvature_callbacks.operators.replicated import ReplicatedDifferencesOperator, ReplicatedOperator, ShardedFisherOperator
from curvature_callbacks.problem.deadline import NO_DEADLINE, Deadline
from curvature_callbacks.problem.mean_gradient import mean_gradient
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.occasion import Occasion
from curvature_callbacks.problem.preconditioner import stability_of
from curvature_callbacks.problem.subject import Subject
from curvature_callbacks.problem.targets import check_targets, num_valid_targets
from curvature_callbacks.processes.world import SINGLE, World

A = TypeVar("A", bound=Operator)
AnyFisher = FisherOperator | ShardedFisherOperator
Names = Iterable[str] | None  # of parameters to differentiate by, default all

# The Gram of all rows cost 1.39 gradients where one product with the Fisher cost 1.41: any spectrum for the price of one step
# of Lanczos. Its eigensolve and its N x N products grow as N^3 and N^2; at 1000 rows they were still small.
_MAX_GRAM_ROWS: Final = 1000


@final
class Problem:
    """What one probe measures. Build and use it inside `isolated(model)`; it must not outlive its probe.

    Args:
        model: the module training runs, unwrapped.
        microbatches: moved to the model's device.
        loss: see `resolve_loss`.
        params_filter: `(name, parameter) -> bool`, which trainable parameters to measure; default all.
        block_structure: see `group_blocks`.
        seed: seeds every random choice of the measurements.
        step: optimizer steps completed.
        memory: facts that earlier probes of the run established, with the same loss and block structure; updated.
        sharing: types of Fisher whose Grams are to come with Kronecker factors, and how positions enter these.
        optimizer: what trains the model, or several of them; only read.
        world: the processes whose microbatches make up the problem; each has the model, and calls every method that computes,
            in the same order.
        deadline: when the probe's time is up, for iterative measurements to end early.

    Attributes:
        grams: `problem.grams()` gives the block Grams of a type of Fisher; its methods what else their passes tell.
        max_gram_rows: most rows of all processes at which the empirical Fisher's eigenpairs are those of its Gram.

    Raises:
        ConfigurationError: no trainable parameter, an undeterminable loss, no microbatch.
    """

    def __init__(
        self,
        model: nn.Module,
        microbatches: Sequence[Any],
        *,
        loss: Loss = None,
        params_filter: ParamsFilter | None = None,
        block_structure: BlockStructure = "layer",
        seed: int = 0,
        step: int = 0,
        memory: ProbeMemory | None = None,
        sharing: Mapping[FisherType, Sharing] | None = None,
        optimizer: Optimizers | None = None,
        world: World = SINGLE,
        deadline: Deadline = NO_DEADLINE,
    ) -> None:
        subject = Subject(
            model=model,
            loss=loss,
            params_filter=params_filter,
            block_structure=block_structure,
            optimizer=optimizer,
            memory=ProbeMemory() if memory is None else memory,
        )
        self._pose(subject, microbatches, Occasion(seed=seed, step=step, world=world, deadline=deadline), sharing or {})

    @classmethod
    def of(
        cls, subject: Subject, microbatches: Sequence[Any], occasion: Occasion, sharing: Mapping[FisherType, Sharing]
    ) -> "Problem":
        """The problem of one probe of a run, whose subject is the same at every probe."""
        problem = cls.__new__(cls)
        problem._pose(subject, microbatches, occasion, sharing)
        return problem

    def _pose(
        self, subject: Subject, microbatches: Sequence[Any], occasion: Occasion, sharing: Mapping[FisherType, Sharing]
    ) -> None:
        if not microbatches:
            raise ConfigurationError("`batches` must hold at least one microbatch, got none.")
        check_model(subject.model)
        self.model = subject.model
        self.optimizer = subject.optimizer
        self.seed = occasion.seed
        self.step = occasion.step
        self.world = occasion.world
        self.deadline = occasion.deadline
        self.objective, self.microbatches = subject.objective(microbatches, self.world)
        self.blocks = subject.blocks(self.objective.parameters)
        self.max_gram_rows = _MAX_GRAM_ROWS
        self.gradient_seconds = 0.0  # wall time of one gradient, once `gradients` was asked for
        context = GramContext(objective=self.objective, memory=subject.memory.grams, seed=self.seed, world=self.world)
        self.grams = ProbeGrams(context, self.microbatches, self.blocks, sharing=sharing)

    def check(self, fisher_types: Sequence[FisherType] = ()) -> None:
        """Raise a `ConfigurationError` when no sample has a valid target, or the loss has not one of these types of Fisher.

        Cost: one forward pass.
        """
        check_targets(self.objective, self.microbatches, fisher_types, seed=self.seed, world=self.world)

    @property
    def num_rows(self) -> int:
        """N, the rows of all microbatches of all processes."""
        return int(self.world.total(torch.tensor(self._own_rows)))

    @property
    def _own_rows(self) -> int:
        return sum(map(batch_size, self.microbatches))

    @cached_property
    def gradients(self) -> Mapping[str, Tensor]:
        """Name to the gradient of the mean loss; its shard on this process where the parameter fits on none.

        Cost: one gradient, whose time is kept as the unit of all others.
        """
        with self.world.together():
            local = mean_gradient(self.objective, self.microbatches)
            self.gradient_seconds = local.seconds
        if self._has_all_rows:
            return local.by_name
        return {name: self.world.total(gradient) for name, gradient in local.by_name.items()}

    @cached_property
    def _num_targets(self) -> int:
        """Valid targets of this process. Cost: one forward pass."""
        with self.world.together():
            return num_valid_targets(self.objective, self.microbatches)

    def hessian(self, names: Names = None) -> HessianOperator | ReplicatedOperator:
        """The Hessian of the mean loss, restricted to the named parameters.

        Raises:
            RefusedError: the model's attention has no second derivative.
        """
        check_second_derivatives(self.model)
        with self.world.together():
            local = HessianOperator(self.objective, self.microbatches, names)
        return self.over_processes(local, local.num_targets)

    def finite_difference_hessian(self, names: Names = None) -> FiniteDifferenceHessianOperator | ReplicatedDifferencesOperator:
        """The same by differences of the gradient, for models without a second derivative."""
        with self.world.together():
            local = FiniteDifferenceHessianOperator(self.objective, self.microbatches, names)
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
        with self.world.together():
            local = GGNOperator(self.objective, self.microbatches, names)
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

    @property
    def _has_all_rows(self) -> bool:
        """Whether an operator of the objective has the rows of all processes."""
        return self.world.size == 1 or self.objective.is_sharded
