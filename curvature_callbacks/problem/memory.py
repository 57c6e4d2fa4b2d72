"""ProbeMemory: what the probes of a run learn about their problem, so that later ones need not."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

from torch import nn

from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.model.blocks import Blocks, BlockStructure, group_blocks
from curvature_callbacks.model.draws import Draws
from curvature_callbacks.model.loss.loop import LoopLoss
from curvature_callbacks.model.loss.resolve import Loss, LossFunction, resolve_loss
from curvature_callbacks.model.loss.sample_losses import SampleLosses


@final
@dataclass(slots=True, kw_only=True)
class ProbeMemory:
    """Facts of one run: its loss and block structure are the same at every probe.

    Attributes:
        loss: the run's loss, which settles its form once.
        blocks: names of the measured parameters, and their blocks.
        settled_at: step of the last probe at which the form of the loss was looked at, None while that has not succeeded.
        rewritten: names of the parameters that the loss changes in place.
        loop: the training loop's own loss, where the measured one is given in another way.
        proof: what the certificate of the objective found; None until it was made.
        looked_at: step of the last probe that tried to make it.
        coupled: the part of the loss that is one of all rows of a batch together, or how such a part shows; None where none is
            known.
        takes_packed_apart: whether sequences out of packed rows have the loss of these; None while none were seen.
        may_slice: whether slices of microbatches have a loss; None while that was not looked at.
        draws: what the loss draws at random.
        in_training_mode: names of the modules without whose training mode the loss is not the one that trains; None until
            that was looked at.
        grams: what is known of the Grams.
    """

    loss: LossFunction | None = None
    blocks: tuple[tuple[str, ...], Blocks] | None = None
    settled_at: int | None = None
    rewritten: set[str] = field(default_factory=set)
    loop: LoopLoss | None = None
    proof: Mapping[str, Any] | None = None
    looked_at: int | None = None
    coupled: str | None = None
    takes_packed_apart: bool | None = None
    may_slice: bool | None = None
    draws: Draws = field(default_factory=Draws)
    in_training_mode: frozenset[str] | None = None
    grams: GramMemory = field(default_factory=GramMemory)

    def loss_of_run(self, loss: Loss, batch: Any) -> LossFunction:
        """The run's loss, resolved for a first `batch` unless an earlier probe has done so; see `resolve_loss`."""
        if self.loss is None:
            self.loss = resolve_loss(loss, batch)
        return self._noting

    def _noting(self, model: nn.Module, batch: Any) -> SampleLosses:
        """The run's losses, which say by themselves that rows are coupled."""
        assert self.loss is not None
        losses = self.loss(model, batch)
        return losses if self.coupled is None or losses.coupled is not None else replace(losses, coupled=self.coupled)

    def blocks_of_run(self, model: nn.Module, names: tuple[str, ...], structure: BlockStructure) -> Blocks:
        """The blocks of these parameters, grouped anew only where an earlier probe measured others; see `group_blocks`."""
        if self.blocks is None or self.blocks[0] != names:
            self.blocks = names, group_blocks(model, names, structure)
        return self.blocks[1]
