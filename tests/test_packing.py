"""Packed rows are found by their positions, and taken apart into a row for each sequence."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from curvature_callbacks import CapturedProbes
from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.packing import packed_rows

LENGTHS = (5, 3, 4)


def tokens(*lengths: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 30, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def flattened(*lengths: int, **options: Any) -> dict[str, Any]:
    return dict(DataCollatorWithFlattening(**options)(tokens(*lengths)))


def rows_of(microbatch: Microbatch) -> list[list[int]]:
    content = microbatch.content
    mask = content.get("attention_mask", torch.ones_like(content["input_ids"]))
    return [row[flags.bool()].tolist() for row, flags in zip(content["input_ids"], mask, strict=True)]


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
def test_every_sequence_becomes_a_row(options: dict[str, Any]) -> None:
    batch = flattened(*LENGTHS, **options)
    microbatch = as_microbatch(batch)
    assert microbatch.num_rows == 3
    assert rows_of(microbatch) == [row["input_ids"] for row in tokens(*LENGTHS)]
    assert microbatch.content.keys() == {"input_ids", "labels", "position_ids", "attention_mask"}
    assert microbatch.content["labels"][1].tolist() == [-100, *tokens(*LENGTHS)[1]["labels"][1:], -100, -100]
    assert microbatch.packed is batch
    assert rows_of(microbatch.take(torch.tensor([2, 0]))) == [tokens(*LENGTHS)[i]["input_ids"] for i in (2, 0)]


def test_lengths_alone_tell_where_sequences_begin() -> None:
    batch = flattened(*LENGTHS, return_flash_attn_kwargs=True, return_position_ids=False)
    assert "position_ids" not in batch
    assert rows_of(as_microbatch(batch)) == [row["input_ids"] for row in tokens(*LENGTHS)]


@pytest.mark.parametrize("ends", [[0, 5, 8, 12, 12, 12], [0, 5, 5, 8, 12]], ids=["filled up", "an empty one"])
def test_ends_may_be_repeated(ends: list[int]) -> None:
    batch = flattened(*LENGTHS, return_flash_attn_kwargs=True, return_position_ids=False)
    batch["cu_seq_lens_q"] = torch.tensor(ends, dtype=torch.int32)
    assert rows_of(as_microbatch(batch)) == [row["input_ids"] for row in tokens(*LENGTHS)]


@pytest.mark.parametrize("ends", [torch.tensor([[0, 5, 12]]), torch.tensor([5, 12]), torch.tensor([0, 8, 5, 12])])
def test_ends_that_cannot_be_read_are_left_alone(ends: Tensor) -> None:
    batch = flattened(*LENGTHS, return_flash_attn_kwargs=True, return_position_ids=False)
    assert packed_rows(batch | {"cu_seq_lens_q": ends}) is None


def test_sequences_of_one_length_need_no_mask() -> None:
    microbatch = as_microbatch(flattened(4, 4))
    assert "attention_mask" not in microbatch.content
    assert microbatch.content["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


def test_several_packed_rows_and_padding_at_their_ends() -> None:
    """Positions by themselves without a label are what some packers fill rows up with."""
    first, second = flattened(3, 4), flattened(2, 3)
    filled = {"input_ids": 0, "labels": -100, "position_ids": 0}
    second = {name: torch.cat([value, torch.full((1, 2), filled[name])], 1) for name, value in second.items()}
    both = {name: torch.cat([first[name], second[name]]) for name in filled}
    assert rows_of(as_microbatch(both)) == [row["input_ids"] for lengths in ((3, 4), (2, 3)) for row in tokens(*lengths)]


def test_one_long_sequence_among_short_ones_is_not_padded_with_all_others() -> None:
    lengths = (60, *[2] * 30)
    microbatch = as_microbatch(flattened(*lengths))
    assert microbatch.num_rows == 31
    assert microbatch.content["input_ids"].shape == (1, 120)
    assert rows_of(microbatch.take(torch.tensor([0]))) == [tokens(*lengths)[0]["input_ids"]]
    assert rows_of(microbatch.take(torch.tensor([1, 30]))) == [tokens(*lengths)[i]["input_ids"] for i in (1, 30)]


@pytest.mark.parametrize("lengths", [LENGTHS, (60, *[2] * 30)], ids=["padded", "one long"])
def test_what_the_loop_does_to_a_batch_later_does_not_matter(lengths: tuple[int, ...]) -> None:
    batch, probes = flattened(*lengths), CapturedProbes(num_microbatches=1, microbatch_size=2)
    probes.offer(batch)
    batch["input_ids"].zero_()
    (kept,) = probes.draw(0) or []
    assert rows_of(kept.take(torch.tensor([1, 0]))) == [tokens(*lengths)[i]["input_ids"] for i in (1, 0)]


def positions(*rows: list[int], **others: Tensor) -> dict[str, Tensor]:
    ids = torch.tensor(rows)
    return {"input_ids": ids + 3, "position_ids": ids, "labels": ids + 3} | others


@pytest.mark.parametrize(
    "batch",
    [
        positions([0, 1, 2, 3], [0, 1, 2, 3]),
        positions([1, 1, 0, 1, 2], attention_mask=torch.tensor([[0, 0, 1, 1, 1]])),
        positions([0, 0, 0, 1, 2], attention_mask=torch.tensor([[0, 0, 1, 1, 1]])),
        positions([2, 3, 0, 1]),
        positions([0, 2, 0, 1]),
        positions([0, 1, 0, 1]) | {"labels": torch.tensor([1])},
        positions([0, 1, 0, 1], weights=torch.ones(3)),
        {"input_ids": torch.ones(2, 3), "position_ids": torch.arange(3).expand(3, 2, 3)},
        {"input_ids": torch.ones(2, 3)},
        torch.ones(2, 3),
    ],
    ids=["one a row", "left", "left with zeros", "no beginning", "a gap", "one label", "weights", "axes", "none", "tensor"],
)
def test_other_rows_are_left_alone(batch: Any) -> None:
    assert packed_rows(batch) is None
