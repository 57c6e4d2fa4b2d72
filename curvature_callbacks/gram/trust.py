"""Trust: what earlier probes of a run found out, so that later ones need not."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from curvature_callbacks.errors import ProbeError, RefusedError
from curvature_callbacks.gram.certificate import TOLERANCE
from curvature_callbacks.gram.scratch import Scratch
from curvature_callbacks.model.blocks import Blocks
from curvature_callbacks.model.losses import LossFunction

Signature = frozenset[tuple[str, tuple[str, ...], tuple[int, ...]]]

CERTIFICATE_FAILED: Final = "certificate failed"  # how the reason of such a fallback begins


@final
@dataclass(slots=True, kw_only=True)
class Trust:
    """What earlier probes of a run found out.

    Attributes:
        loss: the run's loss, which settles its form once.
        scratch: memory that the Grams work in.
        blocks: of the parameters with these names.
        certified: layouts whose Grams were proved.
        refused: parameter to why its rule is not used any more.
        positions_first: parameters whose activations are sequence-first.
        rewritten: parameters that the loss changes in place.
    """

    loss: LossFunction | None = None
    scratch: Scratch = field(default_factory=Scratch)
    blocks: tuple[tuple[str, ...], Blocks] | None = None
    certified: set[Signature] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    positions_first: set[str] = field(default_factory=set)
    rewritten: set[str] = field(default_factory=set)

    def judge(self, errors: Mapping[str, float], fallback: Mapping[str, str]) -> bool:
        """Note the parameters whose certificate failed; whether there are any, so that all has to be taken again.

        The first time a parameter's activations are read sequence-first instead, the second time its gradients are taken row
        by row.

        Raises:
            ProbeError: nothing can be told at this probe.
            RefusedError: one fails although it was taken row by row.
        """
        failed = {name: error for name, error in errors.items() if not error <= TOLERANCE}
        for name, error in failed.items():
            if name in fallback and not math.isfinite(error):
                raise ProbeError(f"the gradients of `{name}` overflow when those of all rows are added up.")
            if name in fallback:
                raise RefusedError(
                    f"`{name}` fails its certificate (relative error {error:.1e}) even row by row: the samples have no "
                    "gradients of their own, or the loss is not a fixed function of the parameters."
                )
            if name not in self.positions_first:
                self.positions_first.add(name)
            else:
                self.refused[name] = f"{CERTIFICATE_FAILED} (relative error {error:.1e})"
        return bool(failed)


def signature(kinds: Mapping[str, Sequence[str]], positions: Mapping[str, Sequence[int]]) -> Signature:
    """Operations with the row layout of each: sample by sample (1), the usual (sample, position) pairs (0), or other."""
    flattened = Counter(count for counts in positions.values() for count in counts if count > 1)
    usual = flattened.most_common(1)[0][0] if flattened else 0
    return frozenset(
        (name, tuple(sorted(set(found))), _layout(positions.get(name, []), usual)) for name, found in kinds.items()
    )


def _layout(positions: Sequence[int], usual: int) -> tuple[int, ...]:
    return tuple(sorted({0 if count == usual else count for count in positions}))
