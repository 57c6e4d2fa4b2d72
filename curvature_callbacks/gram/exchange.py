"""Exchange: what the processes of a run captured of one parameter, brought together on one of them.

Sample i of process r and sample j of process q meet in `K_ij = g_i . g_j`, so one of them needs the other's factors. Every
parameter has an owner that gets the factors of all processes, computes the Gram (and Kronecker factors) as if they were its
own microbatches, and hands the result round. Factors travel once, to one place; each process owns an equal number of
parameters, and holds the factors that all processes have of one parameter at a time.
"""

from collections.abc import Mapping, Sequence
from typing import final

import torch

from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.collector import Collector
from curvature_callbacks.gram.passes import Passed
from curvature_callbacks.processes.parcels import delivered, handed_round, packed
from curvature_callbacks.processes.world import World

Passes = list[list[Placed]]


@final
class Exchange:
    """Finishes the rounds of a probe with the processes of a run: each takes its part in every one, in the same order.

    Args:
        world: the processes.
        local: what the passes of this process find out.
        whole: the same of all processes, by rank; filled at the end of the first round, updated at the end of others.
        collector: computes and keeps what is wanted of a parameter.
        sizes: parameter to its elements; the owners of a turn have parameters of about one size.
        device: where to compute.

    Cost: each use travels once, each result W - 1 times.
    """

    def __init__(
        self,
        world: World,
        local: Passed,
        whole: Passed,
        collector: Collector,
        *,
        sizes: Mapping[str, int],
        device: torch.device,
    ) -> None:
        self._world = world
        self._local = local
        self._whole = whole
        self._collector = collector
        self._names = sorted(sizes, key=lambda name: -sizes[name])
        self._device = device

    def finish(self, uses: dict[str, Passes], postponed: list[str]) -> list[str]:
        """Consume the `uses` together; the names that some process lets wait."""
        found = self._world.gathered((self._local.unruled, postponed, [*uses, *postponed]))
        if not self._whole.sizes:
            self._describe()
        for unruled, *_ in found:
            self._whole.unruled.update({name: why for name, why in unruled.items() if name not in self._whole.unruled})
        self._local.unruled.update(self._whole.unruled)
        later = {name for _, names, _ in found for name in names} - self._whole.unruled.keys()
        here = {name for *_, names in found for name in names} - later - self._whole.unruled.keys()
        names = [name for name in self._names if name in here]
        with torch.no_grad():
            for start in range(0, len(names), self._world.size):
                self._turn(names[start : start + self._world.size], uses)
        self._local.unruled.update(self._whole.unruled)
        return [name for name in self._names if name in later]

    def record_storage_mode(self) -> None:
        """How factors were kept: by the process that kept the most."""
        self._whole.mode = max(self._world.gathered(self._local.mode), key=lambda mode: (len(mode), mode))

    def _describe(self) -> None:
        """The passes of all processes one after the other."""
        local, whole = self._local, self._whole
        own = local.sizes, local.num_passes, local.num_targets, local.operations, local.positions, local.biases
        for sizes, counts, targets, operations, positions, biases in self._world.gathered(own):
            whole.sizes += sizes
            whole.num_passes += counts
            whole.num_targets += targets
            whole.note(operations, positions, biases)

    def _turn(self, names: Sequence[str], uses: Mapping[str, Passes]) -> None:
        """One parameter for every process."""
        own = delivered([packed(uses.get(name) or self._nothing()) for name in names], self._world, self._device)
        found = None
        with self._world.together():
            if self._world.rank < len(names):
                found = self._collector.found(names[self._world.rank], [one for passes in own for one in passes])
        for name, result in zip(names, handed_round(found, self._world, self._device), strict=False):
            self._collector.take(name, result)

    def _nothing(self) -> Passes:
        return [[] for _ in self._local.sizes]
