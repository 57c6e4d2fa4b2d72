"""What the Grams of a probe are computed of, with and within: options, limits and context, each handed on whole."""

from dataclasses import dataclass
from typing import final

from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.storage import KeptForm, MemoryBudget
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.processes.world import SINGLE, World


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GramOptions:
    """Which Grams.

    Attributes:
        fisher_type: of the pseudo-samples.
        max_params_per_block: count a random part of each larger block only, its Gram scaled up to all of it.
        sharing: compute Kronecker factors too, with this treatment of positions.
        budget: bytes for the factors of earlier passes; default see `memory_budget`.
    """

    fisher_type: FisherType = EMPIRICAL
    max_params_per_block: int | None = None
    sharing: Sharing | None = None
    budget: MemoryBudget | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GramLimits:
    """What the computation may take. Numbers depend on it in their last bits only.

    Attributes:
        joined_bytes: captured by a pass over microbatches that were put together.
        gram_bytes: of the Grams of all parameters.
        row_bytes: gradients of single rows held at a time.
        kept_form: of linear layers, while their factors wait for the last pass.
    """

    joined_bytes: int = 8 << 20
    gram_bytes: int = 8 << 30
    row_bytes: int = 1 << 28
    kept_form: KeptForm = "smaller"


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GramContext:
    """What the Grams of one probe have in common.

    Attributes:
        objective: the loss of a microbatch.
        memory: carried from probe to probe, updated.
        seed: of draws, of the certificate's weights and of subsampled parameters.
        world: the processes whose microbatches N spans too, by rank.
        limits: what the computation may take.
        refusal: why rows have no gradients of their own, and there are no Grams; None where they have.
    """

    objective: Objective
    memory: GramMemory
    seed: int
    world: World = SINGLE
    limits: GramLimits = GramLimits()
    refusal: str | None = None
