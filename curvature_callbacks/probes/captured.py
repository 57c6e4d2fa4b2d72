"""Probes of what cannot be indexed: copies of the training batches that went by last."""

from collections import deque
from dataclasses import replace
from typing import Any, final

import torch
from typing_extensions import override

from curvature_callbacks.batches import detached_copy
from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.probes.base import Prepare, Probes


@final
class CapturedProbes(Probes):
    """Copies of the latest training batches, for data that cannot be indexed: streams and combined loaders.

    Args:
        num_microbatches: microbatches a probe, at most.
        microbatch_size: rows of each, at most.
        prepare: what is done to a batch before it is kept.
    """

    def __init__(self, *, num_microbatches: int, microbatch_size: int, prepare: Prepare | None = None) -> None:
        self._recent: deque[Microbatch] = deque(maxlen=num_microbatches)
        self._microbatch_size = microbatch_size
        self._prepare = prepare or (lambda batch: batch)

    def offer(self, batch: Any) -> None:
        """Keep a copy of the first rows of a training batch. Cost: that copy."""
        microbatch = as_microbatch(batch)
        if not microbatch.is_whole:
            microbatch = microbatch.take(torch.arange(min(microbatch.num_rows, self._microbatch_size)))
        self._recent.append(replace(microbatch, content=detached_copy(self._prepare(microbatch.content))))

    @override
    def draw(self, seed: int) -> list[Microbatch] | None:
        """The batches that were kept, oldest first; None before the first one."""
        return list(self._recent) or None
