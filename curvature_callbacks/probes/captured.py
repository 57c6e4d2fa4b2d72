"""Probes of what cannot be indexed: copies of the training batches that went by last."""

import logging
from collections import deque
from dataclasses import replace
from typing import Any, final

import torch
from typing_extensions import override

from curvature_callbacks.batches import detached_copy
from curvature_callbacks.layout import counted_rows, has_rows
from curvature_callbacks.microbatch import Microbatch, drawn_microbatch, unpacked_microbatch
from curvature_callbacks.probes.base import Prepare, Probes

_logger = logging.getLogger("curvature_callbacks")


@final
class CapturedProbes(Probes):
    """Copies of the latest training batches, for data that cannot be indexed: streams and combined loaders.

    A batch of which every tensor has as many rows as the loader reads is cut to its first rows. Any other stays whole, because
    the rows of its tensors are not those that were read: pairs `[chosen; rejected]`, lists of ragged tensors. Of packed rows
    all sequences are kept, a row each.

    The whole of every batch is kept too, for losses that couple rows, unless `offer` is told not to.

    Args:
        num_microbatches: microbatches a probe, at most.
        microbatch_size: rows of each, at most, but for batches that stay whole.
        prepare: what is done to a batch before it is kept.
        batch_size: rows that make up a full training batch; None to take what its tensors agree on.
    """

    def __init__(
        self, *, num_microbatches: int, microbatch_size: int, prepare: Prepare | None = None, batch_size: int | None = None
    ) -> None:
        self._recent: deque[Microbatch] = deque(maxlen=num_microbatches)
        self._whole: deque[Microbatch] = deque(maxlen=num_microbatches)
        self._num_rows = num_microbatches * microbatch_size
        self._microbatch_size = microbatch_size
        self._prepare = prepare or (lambda batch: batch)
        self._batch_size = batch_size
        self._has_warned = False
        self._rows_of_one: int | None = None if batch_size else 1  # of its tensors, for every row that was read

    def offer(self, batch: Any, *, whole: bool = True) -> None:
        """Keep a copy of a training batch, of its first rows where it can be cut; and of all of it where `whole`.

        Cost: these copies.
        """
        microbatch = self._counted(batch)
        if microbatch is None:
            self._warn_once(batch)
            return
        if whole:
            self._whole.append(self._copy(microbatch))
            while sum(kept.num_rows for kept in self._whole) > max(self._num_rows, self._whole[-1].num_rows):
                self._whole.popleft()
        if not microbatch.is_whole and microbatch.packed is None:
            microbatch = microbatch.take(torch.arange(min(microbatch.num_rows, self._microbatch_size)))
        self._recent.append(self._copy(microbatch))

    def _counted(self, batch: Any) -> Microbatch | None:
        """The batch with its rows, None where nothing tells them.

        A full one tells how many rows of its tensors belong to one that was read.
        """
        known = batch if isinstance(batch, Microbatch) else unpacked_microbatch(batch)
        if known is not None:
            return known
        size = counted_rows(batch)
        if size is None:
            if self._batch_size is None:
                return Microbatch(content=batch, num_rows=1, are_rows_known=False) if has_rows(batch) else None
            return Microbatch(content=batch, num_rows=self._batch_size)
        if self._batch_size is None:
            return drawn_microbatch(batch, size)
        if self._rows_of_one is None and size % self._batch_size == 0:
            self._rows_of_one = size // self._batch_size
        if self._rows_of_one is None or size % self._rows_of_one:
            return Microbatch(content=batch, num_rows=size)
        return drawn_microbatch(batch, size // self._rows_of_one)

    def _warn_once(self, batch: Any) -> None:
        if not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "curvature is not measured on batches of type %s, which do not tell how many rows they have: pass "
                "`probe_dataset=` or `probe_dataloader=`. Training is not affected. This is said once.",
                type(batch).__name__,
            )

    @override
    def draw(self, seed: int) -> list[Microbatch] | None:
        """The batches that were kept, oldest first; None before the first one."""
        return list(self._recent) or None

    @override
    def draw_whole(self, seed: int) -> list[Microbatch] | None:
        """The latest whole batches, no more of them than have the rows of a probe, but one at least; None before the first."""
        return list(self._whole) or None

    def _copy(self, microbatch: Microbatch) -> Microbatch:
        if microbatch.packed is not None:  # rows that are collated later are those of the copy too
            return drawn_microbatch(detached_copy(self._prepare(microbatch.packed)), microbatch.num_rows)
        return replace(microbatch, content=detached_copy(self._prepare(microbatch.content)), among=None)
