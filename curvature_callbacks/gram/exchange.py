"""Exchange: what the processes of a run captured of one parameter, brought together on one of them.

Sample i of process r and sample j of process q meet in `K_ij = g_i . g_j`, so one of them needs the other's factors. Every
parameter has an owner that gets the factors of all processes, computes the Gram (and Kronecker factors) as if they were of its
microbatches, and hands the result round. Factors travel once, to one process; each owns an equal number of parameters, and
holds the factors that all processes have of one parameter at a time.
"""

from collections.abc import Mapping, Sequence
from typing import final

import torch

from curvature_callbacks.gram.collector import Collector
from curvature_callbacks.gram.context import GramContext
from curvature_callbacks.gram.passed import Observed, Remainder, Uses
from curvature_callbacks.processes.parcels import delivered_parcels, handed_round, packed


@final
class Exchange:
    """Finishes the rounds of a probe with the processes of a run: each takes its part in every one, in the same order.

    Args:
        context: the processes; the owners of a turn have parameters of about one size.
        collector: computes and keeps the results, the same on every process.

    Attributes:
        observed: the passes of all processes, by rank, once the first round is finished.

    Cost: each use travels once, each result W - 1 times.
    """

    def __init__(self, context: GramContext, collector: Collector) -> None:
        self._world = context.world
        self._device = context.objective.device
        self._collector = collector
        sizes = context.objective.sizes
        self._names = sorted(sizes, key=lambda name: -sizes[name])
        self.observed: Observed | None = None

    def finish(self, uses: Mapping[str, Uses], local: Remainder, observed: Observed) -> Remainder:
        """Compute the Grams of this round across processes; return what remains on any of them.

        Args:
            uses: of this process, of every parameter that it has not postponed.
            local: what remains on this process.
            observed: the passes of this process.
        """
        parts = self._world.gathered((dict(local.unruled), list(local.postponed), [*uses, *local.postponed]))
        if self.observed is None:
            self.observed = Observed.joined(self._world.gathered(observed))
        reasons = _first_reasons([unruled for unruled, *_ in parts])
        later = {name for _, names, _ in parts for name in names} - reasons.keys()
        complete = {name for *_, names in parts for name in names} - later - reasons.keys()
        names = [name for name in self._names if name in complete]
        with torch.no_grad():
            for start in range(0, len(names), self._world.size):
                self._turn(names[start : start + self._world.size], uses, len(observed.sizes))
        return Remainder(postponed=[name for name in self._names if name in later], unruled=reasons)

    def _turn(self, names: Sequence[str], uses: Mapping[str, Uses], num_passes: int) -> None:
        """Compute one parameter on every process and hand the results round."""
        assert self.observed is not None
        nothing: Uses = [[] for _ in range(num_passes)]
        parts = delivered_parcels([packed(uses.get(name) or nothing) for name in names], self._world, self._device)
        result = None
        with self._world.together():
            if self._world.rank < len(names):
                passes = [of_pass for part in parts for of_pass in part]
                result = self._collector.computed(names[self._world.rank], passes, self.observed)
        for name, computed in zip(names, handed_round(result, self._world, self._device), strict=False):
            self._collector.add(name, computed)


def _first_reasons(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Name to the reason of the first process that has one."""
    reasons: dict[str, str] = {}
    for part in parts:
        reasons |= {name: reason for name, reason in part.items() if name not in reasons}
    return reasons
