"""Batches put together: the inverse of taking rows, or nothing at all."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from curvature_callbacks.microbatch import as_microbatch, joined

Pair = namedtuple("Pair", ["inputs", "targets"])


@dataclass(frozen=True)
class Record:
    inputs: Tensor
    targets: Tensor


ids, labels = torch.arange(20).view(5, 4), torch.arange(5)


def same(first: Any, second: Any) -> bool:
    """Equal in kind and content, by another walk than `joined`'s."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(same(*both) for both in zip(first, second, strict=True))
    if isinstance(first, Record):
        return same((first.inputs, first.targets), (second.inputs, second.targets))
    if hasattr(first, "keys"):
        return list(first.keys()) == list(second.keys()) and all(same(first[key], second[key]) for key in list(first.keys()))
    return bool(first == second)


@pytest.mark.parametrize(
    "batch",
    [
        ids,
        (ids, labels),
        [ids, labels],
        Pair(ids.float(), labels),
        {"input_ids": ids, "labels": labels},
        BatchEncoding({"input_ids": ids, "labels": labels}),
        {"labels": labels, "nested": {"mask": ids > 3, "more": (ids, ids)}, "scale": torch.tensor(2.0), "task": "copy"},
        {"labels": labels, "names": list("abcde")},
        Record(ids, labels),
    ],
    ids=["tensor", "tuple", "list", "named tuple", "mapping", "encoding", "nested", "strings", "dataclass"],
)
def test_pieces_of_a_batch_make_the_batch(batch: Any):
    first, second = (as_microbatch(batch).take(torch.tensor(rows)) for rows in ([0, 1], [2, 3, 4]))
    together = joined(first, second)
    assert together is not None
    assert same(together.content, batch)


@pytest.mark.parametrize(
    "second",
    [
        {"ids": ids[:, :3], "labels": labels},
        {"ids": ids, "labels": labels, "mask": ids},
        {"labels": labels, "ids": ids},
        {"ids": ids.int(), "labels": labels},
        {"ids": ids[..., None], "labels": labels},
        {"ids": [ids], "labels": labels},
        (ids, labels),
    ],
    ids=["length", "keys", "order", "dtype", "axes", "kind", "container"],
)
def test_batches_that_differ_in_more_than_rows_stay_apart(second: Any):
    assert joined(as_microbatch({"ids": ids, "labels": labels}), as_microbatch(second)) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor(1.0), torch.tensor(2.0)),
        (torch.zeros(3), torch.ones(3)),
        ("copy", "sort"),
        (object(), object()),
        ([1], [1, 2]),
        ([1], [2]),
    ],
    ids=["scalar", "vector", "name", "object", "length of a list", "content of a list"],
)
def test_what_is_no_row_must_be_the_same(one: Any, other: Any):
    assert joined(as_microbatch({"labels": labels, "x": one}), as_microbatch({"labels": labels, "x": other})) is None
