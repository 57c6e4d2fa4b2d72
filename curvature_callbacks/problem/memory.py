"""ProbeMemory: what the probes of a run learn about their problem, so that later ones need not."""

from dataclasses import dataclass, field
from typing import Any, final

from torch import nn

from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.model.blocks import Blocks, BlockStructure, group_blocks
from curvature_callbacks.model.loss.resolve import Loss, LossFunction, resolve_loss


@final
@dataclass(slots=True, kw_only=True)
class ProbeMemory:
    """Facts of one run: its loss and block structure are the same at every probe.

    Attributes:
        loss: the run's loss, which settles its form once.
        blocks: names of the measured parameters, and their blocks.
        rewritten: names of the parameters that the loss changes in place.
        coupled: the part of the loss that is one of all rows of a batch together; None where none is known.
        is_reached: whether it is proved that the loss is reached by way of the parameters it trains.
        grams: what is known of the Grams.
    """

    loss: LossFunction | None = None
    blocks: tuple[tuple[str, ...], Blocks] | None = None
    rewritten: set[str] = field(default_factory=set)
    coupled: str | None = None
    is_reached: bool = False
    grams: GramMemory = field(default_factory=GramMemory)

    def loss_of_run(self, loss: Loss, batch: Any) -> LossFunction:
        """The run's loss, resolved for a first `batch` unless an earlier probe has done so; see `resolve_loss`."""
        if self.loss is None:
            self.loss = resolve_loss(loss, batch)
        return self.loss

    def blocks_of_run(self, model: nn.Module, names: tuple[str, ...], structure: BlockStructure) -> Blocks:
        """The blocks of these parameters, grouped anew only where an earlier probe measured others; see `group_blocks`."""
        if self.blocks is None or self.blocks[0] != names:
            self.blocks = names, group_blocks(model, names, structure)
        return self.blocks[1]
