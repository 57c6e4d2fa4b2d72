"""Passes: hooked forward and backward passes over all microbatches, in rounds by groups of parameters.

One *pass* is a forward pass over a microbatch and one backward pass for each of its surrogates. A *round* is all passes, for a
group of parameters; those whose factors do not fit until the last pass are postponed to another round.

              microbatch 0        microbatch 1        ...      last microbatch
    round 1   keep a b c d  ->  a b c  (d does not fit)  ->  complete c, b, a on the way of the last backward pass
    round 2   keep d        ->  d                        ->  complete d

A parameter is *complete* when all passes have its uses; its Gram is computed and its uses are freed before the backward pass
goes on. With several processes nothing is completed on the way: at the end of a round all of them exchange what they kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.capture.interception import Capture
from curvature_callbacks.gram.context import GramContext
from curvature_callbacks.gram.passed import Observed, Passed, Remainder, Uses
from curvature_callbacks.gram.row_by_row import check_rows
from curvature_callbacks.gram.storage import Storage
from curvature_callbacks.microbatch import Microbatch, joined
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.loss.surrogates import Surrogate, padded, surrogates

_ANY_KERNEL: Final = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # nothing is differentiated twice here, so that fused attention will do

Consume = Callable[[str, Uses, Observed], None]

Finish = Callable[[Mapping[str, Uses], Remainder, Observed], Remainder]


def run_passes(
    context: GramContext,
    microbatches: Sequence[Microbatch],
    fisher_type: FisherType,
    storage: Storage,
    *,
    unruled: Mapping[str, str],
    consume: Consume,
    finish: Finish | None = None,
) -> Passed:
    """Every microbatch forward once and backward once a surrogate, for all parameters that have a rule.

    Until the last pass what earlier ones captured waits in `storage`. All ways to keep it give the same numbers. Microbatches
    that capture little are run together, unless memory has run out before in this run: the cost of a small pass is that of its
    launches. The first microbatch, alone, tells how much a row captures.

    Args:
        context: the loss, seeds and limits.
        microbatches: of this process.
        fisher_type: what the surrogates are of.
        storage: keeps captured uses, and says which parameters are postponed.
        unruled: parameter to why it has no valid rule, as known before; it is not captured. Those met here are in the result.
        consume: gets a parameter and its uses in every pass, as soon as they are complete.
        finish: at the end of a round gets the uses of every parameter and what remains on this process, instead of `consume`;
            returns what remains on any.

    Cost: forward passes, and backward passes for activation gradients only; each further round the same again.
    """
    may_join = fisher_type == EMPIRICAL and finish is None and context.memory.row_limit is None  # others draw by microbatch
    may_join = may_join and not context.objective.draws.is_random
    plan = _Plan(context, fisher_type, microbatches, may_join=may_join)
    remainder = Remainder(postponed=[name for name in context.objective.parameters if name not in unruled], unruled=unruled)
    while True:
        remainder = _Round(context, plan, storage, consume, finish, remainder.postponed, remainder.unruled).run()
        plan.is_complete = True
        if not remainder.postponed:
            return Passed(
                microbatches=plan.microbatches,
                surrogates=plan.surrogates,
                observed=plan.observed,
                unruled=remainder.unruled,
            )
        storage.start_round()


@final
class _Plan:
    """What the passes are: drawn and observed in the first round, repeated in the others.

    Args:
        context: the loss, seeds and limits.
        fisher_type: what the surrogates are of.
        microbatches: as they came.
        may_join: whether small ones may be put together.

    Attributes:
        microbatches: as they are run.
        surrogates: of the microbatches seen so far.
        is_complete: whether the first round is over.
    """

    def __init__(
        self, context: GramContext, fisher_type: FisherType, microbatches: Sequence[Microbatch], *, may_join: bool
    ) -> None:
        self._context = context
        self._fisher_type = fisher_type
        self._may_join = may_join
        self._seen: list[Observed] = []
        self.microbatches = microbatches
        self.surrogates: list[Sequence[Surrogate | None]] = []
        self.is_complete = False

    @property
    def observed(self) -> Observed:
        """What the forward passes have seen so far."""
        return Observed.joined(self._seen)

    def chosen(self, index: int, losses: SampleLosses, capture: Capture) -> Sequence[Surrogate | None]:
        """What the backward passes of a microbatch differentiate, None for the sum of its losses."""
        if not self.is_complete:
            self._observe(index, losses, capture)
        return self.surrogates[index]

    def join_small(self, captured_bytes: int) -> None:
        """Put the microbatches after the first together, while a pass over them captures little.

        Args:
            captured_bytes: by the pass over the first one.
        """
        if not self._may_join:
            return
        first, *rest = self.microbatches
        bytes_per_row = captured_bytes / first.num_rows
        most_rows = self._context.limits.joined_bytes / bytes_per_row if bytes_per_row else 0
        run = [first]
        for batch in rest:
            is_small = len(run) > 1 and run[-1].num_rows + batch.num_rows <= most_rows
            together = joined(run[-1], batch) if is_small else None
            run[-1:] = [run[-1], batch] if together is None else [together]
        self.microbatches = run

    def _observe(self, index: int, losses: SampleLosses, capture: Capture) -> None:
        size = self.microbatches[index].num_rows
        chosen = self._surrogates(index, losses)
        self.surrogates.append(chosen)
        self._seen.append(
            Observed(
                sizes=[size] * len(chosen),
                num_passes=[len(chosen)],
                num_targets=[losses.num_targets.cpu()],
                operations=capture.operations,
                positions=capture.positions,
            )
        )
        self._check_size()

    def _surrogates(self, index: int, losses: SampleLosses) -> Sequence[Surrogate | None]:
        fisher_type, objective = self._fisher_type, self._context.objective
        if fisher_type.fisher != "empirical" or fisher_type.sample_unit != "sequence":
            drawn = surrogates(fisher_type, losses, seed=self._context.world.seed(self._context.seed) + index)
            return padded(drawn, objective.most(len(drawn)))  # where all must take part in every pass
        if losses.per_sample is None:
            self._may_join = False  # the mean of a batch is known of this batch only
            batch = self.microbatches[index]
            if batch.num_rows > 1:
                check_rows(objective, batch, losses)
        return [None]

    def _check_size(self) -> None:
        """Raise a `ConfigurationError` where the Grams themselves would not fit."""
        samples = sum(size for seen in self._seen for size in seen.sizes)
        parameters, limit = len(self._context.objective.parameters), self._context.limits.gram_bytes
        if 8 * samples**2 * parameters > limit:
            raise ConfigurationError(
                f"{samples} pseudo-samples of {parameters} parameters need Grams of {8 * samples**2 * parameters / 2**30:.0f} "
                f"GiB, more than {limit >> 30}: take fewer rows, draws or targets, or `fisher`='sampled' for 'exact'."
            )


@final
@dataclass(slots=True, eq=False)
class _Round:
    """All passes for a group of parameters."""

    context: GramContext
    plan: _Plan
    storage: Storage
    consume: Consume
    finish: Finish | None
    names: Sequence[str]
    unruled: Mapping[str, str]  # before this round, then with those met in it
    uses: dict[str, Uses] = field(init=False)  # kept so far
    num_passes: int = 0  # done so far
    observed: Observed | None = None  # once the last forward pass is done

    def run(self) -> Remainder:
        """Process every parameter that fits the memory budget; return what remains."""
        self.uses = {name: [] for name in self.names}
        postponed: list[str] = []
        index = 0
        while index < len(self.plan.microbatches):
            postponed += self._microbatch(index)
            if index == 0 and not postponed and not self.plan.is_complete:
                self.plan.join_small(self.storage.captured)
            index += 1
        observed = self.plan.observed if self.observed is None else self.observed
        if self.finish is not None:
            local = Remainder(postponed=postponed, unruled=self.unruled)
            return self.finish({name: self._padded(uses) for name, uses in self.uses.items()}, local, observed)
        with torch.no_grad():
            for name, uses in self.uses.items():  # used by no microbatch's loss, or not by the last one
                if name not in self.unruled:
                    self.consume(name, self.storage.returned(name, self._padded(uses)), observed)
        return Remainder(postponed=[name for name in self.names if name in set(postponed)], unruled=self.unruled)

    def _microbatch(self, index: int) -> list[str]:
        """Run one microbatch; return the names postponed."""
        objective, batch = self.context.objective, self.plan.microbatches[index]
        values = {name: parameter.detach() for name, parameter in objective.parameters.items()}
        capture = self._capture(values, batch)
        with objective.saving(), capture, sdpa_kernel(_ANY_KERNEL):
            losses = objective(batch.mapped(torch.Tensor.detach), values, watch=capture)
        self.unruled = capture.unruled
        chosen = self.plan.chosen(index, losses, capture)
        is_last = index == len(self.plan.microbatches) - 1
        if is_last:
            self.observed = self.plan.observed
        postponed: list[str] = []
        for number, surrogate in enumerate(chosen):
            again = number < len(chosen) - 1
            completes = is_last and not again and self.finish is None
            total = losses.total if surrogate is None else surrogate(losses).sum()
            if not again:
                del losses  # the logits, which the graph may not need
            capture.backward(total, self._complete if completes else self._keep, again=again)
            self.num_passes += 1
            if not completes:
                postponed += self._postpone((index + (number + 1) / len(chosen)) / len(self.plan.microbatches))
        return postponed

    def _capture(self, values: dict[str, Tensor], batch: Microbatch) -> Capture:
        objective = self.context.objective
        unsharded = objective.unsharded_parameters
        captured = {name: values[name] for name in self.names if name in unsharded}
        others = [value for name, value in values.items() if name not in captured and name in unsharded]
        return Capture(
            captured,
            batch.num_rows,
            unruled=self.unruled,
            positions_first=self.context.memory.positions_first,
            constants=[*others, *objective.constants()],
            sharded={name for name in self.names if name not in unsharded},
        )

    def _keep(self, name: str, uses: list[Placed]) -> None:
        """Keep what a pass before the last captured of a parameter that is not postponed."""
        if name in self.uses:
            self.uses[name] = [*self._padded(self.uses[name]), self.storage.keep(name, uses)]

    def _complete(self, name: str, uses: list[Placed]) -> None:
        """Consume a parameter that is not postponed, in the last backward pass."""
        if name in self.uses:
            kept = self.storage.returned(name, self._padded(self.uses.pop(name)))
            assert self.observed is not None
            self.consume(name, [*kept, uses], self.observed)

    def _padded(self, uses: Uses) -> Uses:
        """`uses` with an empty list for every pass so far that did not reach the parameter."""
        return uses + [[] for _ in range(self.num_passes - len(uses))]

    def _postpone(self, share: float) -> list[str]:
        """Drop parameters that would not fit until the last pass, when `share` of all passes are done."""
        later = self.storage.postponed(self.uses, share)
        for name in later:
            del self.uses[name]
        return later
