"""GramMemory: facts about Grams that earlier probes of a run established, so that later ones need not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, final

from curvature_callbacks.errors import ProbeError, RefusedError
from curvature_callbacks.gram.products.scratch import Scratch

TOLERANCE: Final = 1e-4  # of the certificate: a right Gram agrees to 1e-7, a wrong sample axis misses by 0.7

Signature = frozenset[tuple[str, tuple[str, ...], tuple[int, ...]]]  # see `gram.certificate.signature`


@final
@dataclass(slots=True, kw_only=True)
class GramMemory:
    """Facts established by earlier probes of a run.

    Attributes:
        scratch: memory that the Grams work in.
        certified: layouts whose Grams were proved.
        refused: parameter to why its rule is not used any more.
        failed: those of them whose certificate failed.
        positions_first: parameters whose activations are sequence-first.
        row_limit: most rows of a microbatch, once memory has run out; from then on none are put together.
    """

    scratch: Scratch = field(default_factory=Scratch)
    certified: set[Signature] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    positions_first: set[str] = field(default_factory=set)
    row_limit: int | None = None

    def judge(self, errors: Mapping[str, float], fallback: Mapping[str, str]) -> bool:
        """Note the parameters whose certificate failed; return whether there are any, so that another attempt is needed.

        After the first failure a parameter's activations are read sequence-first instead, after the second its gradients are
        taken row by row.

        Args:
            errors: parameter to its certificate's error.
            fallback: the parameters taken row by row.

        Raises:
            ProbeError: gradients overflow in the sum over rows: this probe proves nothing.
            RefusedError: a parameter fails although it was taken row by row.
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
                self.failed.add(name)
                self.refused[name] = f"certificate failed (relative error {error:.1e})"
        return bool(failed)
