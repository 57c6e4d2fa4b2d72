"""Packing: several sequences in one row of a batch, as collators without padding make them, and a row for each again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from curvature_callbacks.batches import CONSTANTS

_IGNORED: Final = -100  # of labels
_OF_THE_PACKING: Final = {
    *("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "max_length_q", "max_length_k"),
    *("seq_idx", "seq_lengths", "attention_mask"),
}
_WASTE: Final = 4  # positions with padding for every position without, at most


@final
@dataclass(frozen=True, slots=True)
class PackedRows:
    """The sequences in the rows of a batch.

    Attributes:
        content: the batch, tensors of shape (rows, positions, ...).
        places: row, first position and the one behind the last of each sequence.
    """

    content: Mapping[str, Any]
    places: Sequence[tuple[int, int, int]]

    @property
    def wastes(self) -> bool:
        """Whether a row for each sequence would be padding for the most part."""
        lengths = [stop - start for _, start, stop in self.places]
        return max(lengths) * len(lengths) > _WASTE * sum(lengths)

    def padded(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The given sequences as a batch with a row for each, shorter ones padded behind and masked there.

        Labels are padded with -100, all else with zeros. Cost: a copy.
        """
        places = [self.places[number] for number in numbers]
        batch: dict[str, Any] = {}
        for name, value in self.content.items():
            if name in _OF_THE_PACKING:
                continue
            if not isinstance(value, Tensor) or not value.ndim:
                batch[name] = value
                continue
            pieces = [value[row, start:stop] for row, start, stop in places]
            batch[name] = pad_sequence(pieces, batch_first=True, padding_value=_IGNORED if "label" in str(name) else 0)
        lengths = torch.tensor([stop - start for _, start, stop in places])
        if (lengths != lengths[0]).any():
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            batch["attention_mask"] = mask.to(_device_of(batch), torch.int64)
        return batch


def packed_rows(content: Any) -> PackedRows | None:
    """What a batch packs, by the restarts of its `position_ids`, else by `cu_seq_lens_q`; None where every row is one sequence.

    None also where positions are masked, or where tensors have something else than one entry a position: sequences cannot be
    taken apart then. A position by itself without a label is padding.
    """
    if not isinstance(content, Mapping):
        return None
    starts = _starts(content)
    mask = content.get("attention_mask")
    if starts is None or (isinstance(mask, Tensor) and (mask.ndim != 2 or not bool(mask.all()))):
        return None
    if not all(_can_be_split(name, value, starts.shape) for name, value in content.items()):
        return None
    places = [place for row, flags in enumerate(starts.cpu()) for place in _sequences(row, flags)]
    labels = content.get("labels")
    if isinstance(labels, Tensor) and labels.shape == starts.shape:
        given = (labels != _IGNORED).cpu()
        places = [(row, start, stop) for row, start, stop in places if stop - start > 1 or bool(given[row, start])]
    return PackedRows(content, places) if len(places) > len(starts) else None


def _starts(content: Mapping[str, Any]) -> Tensor | None:
    """(rows, positions) where a sequence begins; None where nothing tells that."""
    positions, ends = content.get("position_ids"), content.get("cu_seq_lens_q")
    if isinstance(positions, Tensor):
        if positions.ndim != 2 or positions.shape[1] == 0 or positions.is_floating_point():
            return None
        starts = positions == 0
        goes_on = positions[:, 1:] == positions[:, :-1] + 1
        return starts if bool(starts[:, 0].all()) and bool((goes_on | starts[:, 1:]).all()) else None
    tokens = content.get("input_ids")
    if not isinstance(ends, Tensor) or not isinstance(tokens, Tensor) or tokens.ndim != 2 or len(tokens) != 1:
        return None
    begins = ends.cpu()
    if begins.ndim != 1 or begins.is_floating_point() or not len(begins) or begins[0] != 0 or bool((begins.diff() < 0).any()):
        return None
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    starts[0, begins[begins < tokens.shape[1]].long()] = True  # ends may be repeated, to be as many in every batch
    return starts


def _sequences(row: int, starts: Tensor) -> list[tuple[int, int, int]]:
    begins = starts.nonzero()[:, 0].tolist()
    return [(row, start, stop) for start, stop in zip(begins, [*begins[1:], len(starts)], strict=True)]


def _can_be_split(name: str, value: Any, shape: torch.Size) -> bool:
    if name in _OF_THE_PACKING or isinstance(value, CONSTANTS):
        return True
    return isinstance(value, Tensor) and (value.ndim == 0 or value.shape[:2] == shape)


def _device_of(batch: Mapping[str, Any]) -> torch.device:
    return next(value.device for value in batch.values() if isinstance(value, Tensor) and value.ndim)
