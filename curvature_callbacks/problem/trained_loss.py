"""TrainedLoss: the loss that trains, on batches of which the rows may depend on each other."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch

from curvature_callbacks.errors import ProbeError, RefusedError, is_out_of_memory, named
from curvature_callbacks.microbatch import Microbatch
from curvature_callbacks.model.batch_norm import BatchNorm, BatchNorms, batch_norms
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.probes import with_seeds
from curvature_callbacks.problem.occasion import Occasion
from curvature_callbacks.problem.subject import Subject

_logger = logging.getLogger("curvature_callbacks")


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WholeBatches:
    """What Hessians and the GGN are made of: a loss that may couple rows, and batches that are never cut.

    Attributes:
        objective: of a batch, with batch norms as they were chosen.
        microbatches: whole batches where rows are coupled, else the microbatches of the probe.
        about: for records: `batch_norm`; `num_rows`, N of all processes; where rows are coupled `coupled`, by what, and
            `batch_size`, rows of a batch.
    """

    objective: Objective
    microbatches: Sequence[Microbatch]
    about: Mapping[str, Any]


@final
class TrainedLoss:
    """The loss of a probe as it trains, taken by what needs no rows apart.

    Every process has batches of its own, and batch norms normalise each by itself, as under DDP.

    Args:
        subject: of the run; its memory knows whether the loss couples rows.
        occasion: of the probe.
        objective: the loss on running statistics.
        microbatches: of the probe.

    Attributes:
        num_taken: how often it was taken.
    """

    def __init__(self, subject: Subject, occasion: Occasion, objective: Objective, microbatches: Sequence[Microbatch]) -> None:
        self._subject = subject
        self._occasion = occasion
        self._objective = objective
        self._microbatches = microbatches
        self._taken: WholeBatches | None = None
        self.num_taken = 0

    def take(self) -> WholeBatches:
        """The loss on whole batches, which are drawn at the first call; called by all processes.

        Raises:
            RefusedError: a batch norm normalises over several processes.
            ProbeError: no whole batch has been seen yet.

        Cost: that of drawing, at the first call.
        """
        self.num_taken += 1
        if self._taken is None:
            norms = self._norms(self._subject.batch_norm or "batch")
            norms.refuse_synchronised()
            reasons = [*(["batch norm"] if norms.are_coupling else []), self._subject.memory.coupled]
            coupled = " and ".join(reason for reason in reasons if reason)
            microbatches = [_uncut(microbatch) for microbatch in self._whole()] if coupled else self._microbatches
            statistics: BatchNorm = "batch" if norms.switched or norms.are_coupling else "eval"
            sizes = [microbatch.num_rows for microbatch in microbatches]
            self._taken = WholeBatches(
                objective=self._objective.normalised_by(norms) if norms.switched else self._objective,
                microbatches=microbatches,
                about=self._about(statistics, coupled, sizes),
            )
        return self._taken

    def example(self) -> Microbatch | None:
        """A whole batch, None where there is none, or none that can be read; called by all processes. Cost: that of drawing."""
        try:
            return max(self._whole(), key=lambda batch: batch.num_rows)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            _logger.debug("no whole batch could be drawn: %s", named(error))
            return None

    @property
    def coupling(self) -> str | None:
        """What couples the rows of the batches that were taken; None where nothing does, or none were taken."""
        return None if self._taken is None else self._taken.about.get("coupled")

    @cached_property
    def losses(self) -> list[float] | None:
        """The mean loss of each whole batch of all processes; None where none were taken because rows are coupled.

        Cost: one forward pass of these batches.
        """
        if self._taken is None or self.coupling is None:
            return None
        with self._occasion.world.together(), torch.no_grad():
            found = [self._taken.objective(microbatch) for microbatch in self._taken.microbatches]
            local = [float(each.total / each.num_targets.sum()) for each in found if each.num_targets.any()]
        return [loss for losses in self._occasion.world.gathered(local) for loss in losses]

    def refuse_rows(self) -> None:
        """Raise a `RefusedError` where rows have no gradients of their own, because the statistics of the batch were chosen."""
        if self.row_refusal is not None:
            raise RefusedError(self.row_refusal)

    @cached_property
    def row_refusal(self) -> str | None:
        """Why rows have no gradients of their own; None where they have, or where a closer look is needed."""
        if self._subject.batch_norm != "batch" or not self._norms("batch").are_coupling:
            return None
        return (
            "with `batch_norm`='batch' the statistics of a batch couple its samples: they have no gradients of their own, and "
            "there is no Fisher of them. Leave `batch_norm` at None, or choose 'eval': Fishers are then those of the running "
            "statistics."
        )

    def _norms(self, batch_norm: BatchNorm) -> BatchNorms:
        return batch_norms(self._subject.model, batch_norm=batch_norm, in_training=self._occasion.in_training)

    def _whole(self) -> Sequence[Microbatch]:
        draw, world = self._occasion.draw_whole, self._occasion.world
        if draw is None:
            return self._microbatches
        with world.together():
            drawn = draw()
            if not drawn:
                raise ProbeError("no whole batch of the training data was seen yet, and the loss couples the rows of a batch.")
            seeded = with_seeds(drawn, self._occasion.seed, world)
            batches = [microbatch.on(self._subject.device) for microbatch in seeded]
        if self._objective.is_sharded:  # every pass gathers parameters, and all processes must take part
            batches = batches[: min(world.gathered(len(batches)))]
        return batches

    def _about(self, batch_norm: BatchNorm, coupled: str, sizes: Sequence[int]) -> dict[str, Any]:
        world = self._occasion.world
        about = {"batch_norm": batch_norm, "num_rows": int(world.total(torch.tensor(sum(sizes))))}
        return about | {"coupled": coupled, "batch_size": max(world.gathered(max(sizes)))} if coupled else about


def _uncut(microbatch: Microbatch) -> Microbatch:
    """The same batch as it was drawn, of which nothing takes rows any more."""
    return replace(microbatch.as_packed(), is_sliceable=False, collate=None)
