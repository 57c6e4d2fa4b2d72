"""Problem: model, blocks, loss and microbatches of one probe; what measurements share is built once."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final, final

from torch import Tensor, nn

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.gram.context import GramContext
from curvature_callbacks.gram.probe_grams import ProbeGrams
from curvature_callbacks.model.batch_norm import BatchNorm
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.checks import check_model
from curvature_callbacks.model.loss.averages import Settling
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.probes import with_seeds
from curvature_callbacks.problem.certificate import prove_objective
from curvature_callbacks.problem.coupling import FEWEST_ROWS, coupling_of_rows
from curvature_callbacks.problem.deadline import NO_DEADLINE, Deadline
from curvature_callbacks.problem.mean_gradient import mean_gradient
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.occasion import Occasion
from curvature_callbacks.problem.operators import ProblemOperators
from curvature_callbacks.problem.subject import Subject
from curvature_callbacks.problem.targets import check_targets
from curvature_callbacks.problem.trained_loss import TrainedLoss
from curvature_callbacks.processes.world import SINGLE, World

# The Gram of all rows cost 1.39 gradients where one product with the Fisher cost 1.41: any spectrum for the price of one step
# of Lanczos. Its eigensolve and its N x N products grow as N^3 and N^2; at 1000 rows they were still small.
_MAX_GRAM_ROWS: Final = 1000


@final
class Problem(ProblemOperators):
    """What one probe measures. Build and use it inside `isolated(model)`; it must not outlive its probe.

    Args:
        model: the module training runs, unwrapped.
        microbatches: `Microbatch` objects, or batches whose rows are counted by inspection; moved to the model's device.
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
        batch_norm: statistics of the batch, as in training (`batch`), or running ones (`eval`); None for `batch` in Hessians
            and the GGN, on whole batches, and for `eval` in all that is made of single rows.

    Attributes:
        microbatches: `Microbatch` objects on the model's device; `objective` takes them, the loss gets their `.content`.
        objective: the loss on running statistics, for what is made of single rows.
        trained: the loss as it trains, on whole batches where it couples their rows.
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
        batch_norm: BatchNorm | None = None,
    ) -> None:
        subject = Subject(
            model=model,
            loss=loss,
            params_filter=params_filter,
            block_structure=block_structure,
            optimizer=optimizer,
            memory=ProbeMemory() if memory is None else memory,
            batch_norm=batch_norm,
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
        self._memory = subject.memory
        self.objective, self.microbatches = subject.objective(with_seeds(microbatches, self.seed, self.world), self.world)
        self.blocks = subject.blocks(self.objective.parameters)
        self.max_gram_rows = _MAX_GRAM_ROWS
        self.gradient_seconds = 0.0  # wall time of one gradient, once `gradients` was asked for
        self.loss, self.microbatch_losses = float("nan"), list[float]()  # their means, likewise
        self.trained = TrainedLoss(subject, occasion, self.objective, self.microbatches)
        context = GramContext(
            objective=self.objective,
            memory=subject.memory.grams,
            seed=self.seed,
            world=self.world,
            refusal=self.trained.row_refusal,
        )
        self.grams = ProbeGrams(context, self.microbatches, self.blocks, sharing=sharing)

    def settle_loss(self) -> None:
        """Find out how the loss averages and shifts, or look whether that still holds; once a probe, on all processes.

        Raises:
            ProbeError: several ways are possible that make different numbers of these microbatches.

        Cost: forward passes of few rows at two probes of a run, and at one that is the first with new kinds of batches; see
        `OwnLoss`.
        """
        if self._memory.settled_at == self.step:
            return
        if isinstance(self._memory.loss, Settling):
            with self.world.together():
                self._memory.loss.settle(self.objective.with_leaves, self.microbatches, self.world)
        self._memory.settled_at = self.step

    def check(self, fisher_types: Sequence[FisherType] = (), *, rows: int | None = None) -> None:
        """Raise a `ConfigurationError` when no sample has a valid target, the loss has not one of these types of Fisher, or the
        objective is not the one that trains (see `prove_objective`, once a run).

        Args:
            fisher_types: that measurements ask for.
            rows: to prove the objective at; default an eighth of the problem's.

        Cost: one forward pass, and once a run at most one gradient of the problem's rows.
        """
        targets = check_targets(self.objective, self.microbatches, fisher_types, seed=self.seed, world=self.world)
        self._memory.coupled = self._memory.coupled or targets.coupled
        if self._memory.proof is None:
            batch = self.microbatches[targets.counts.index(max(targets.counts))]
            if self._memory.coupled is None and self.world.anywhere(batch.num_rows < FEWEST_ROWS):
                self._memory.coupled = self._coupling_of_whole_batch()
            prove_objective(
                self.objective,
                batch,
                self._memory,
                most_rows=max(2, self._own_rows // 8) if rows is None else rows,
                seed=self.seed,
                world=self.world,
            )

    def _coupling_of_whole_batch(self) -> str | None:
        """What couples the rows of a batch of the size of training, of which microbatches have too few to tell."""
        if self.objective.is_sharded:  # every pass is one of all processes
            return None
        whole = self.trained.example()
        if self.world.anywhere(whole is None or whole.is_whole):
            return None
        assert whole is not None
        return coupling_of_rows(self.objective, whole, seed=self.seed, world=self.world)

    def prove(self) -> None:
        """Check once a run: of a stream nothing may have been checked before training. Once a probe while nothing is told."""
        if self._memory.proof is None and self._memory.looked_at != self.step:
            self.check()
            self._memory.looked_at = self.step  # only now: what was refused is refused to every measurement

    @property
    def proof(self) -> Mapping[str, Any]:
        """What the certificate of the objective found, JSON-able; empty until it was made."""
        return self._memory.proof or {}

    @property
    def packing(self) -> str | None:
        """What a row is where several sequences are packed in one: `sequences` or `packed rows`; None where none were seen."""
        apart = self._memory.takes_packed_apart
        return None if apart is None else "sequences" if apart else "packed rows"

    @cached_property
    def gradients(self) -> Mapping[str, Tensor]:
        """Name to the gradient of the mean loss; its shard on this process where the parameter fits on none.

        Cost: one gradient, whose time is kept as the unit of all others.
        """
        with self.world.together():
            local = mean_gradient(self.objective, self.microbatches)
            self.gradient_seconds = local.seconds
        self.loss = float(self.world.total(local.loss))
        self.microbatch_losses = [each for losses in self.world.gathered(local.microbatch_losses) for each in losses]
        if self._has_all_rows:
            return local.by_name
        return {name: self.world.total(gradient) for name, gradient in local.by_name.items()}
