"""Regions: disjoint parts of a parameter, each with all the uses whose gradients lie in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, final

from torch import Tensor

from curvature_callbacks.gram.capture.derived import Placed, View
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.uses import Dense, Use

_OVERLAPPING: Final = Operation("views that overlap")
_DENSE_BYTES: Final = 256 << 20  # per-sample gradients written out where views of a parameter overlap


@final
@dataclass(frozen=True, slots=True)
class Region:
    """A part of a parameter.

    Attributes:
        uses: for each pass.
        num_rows: rows of the part.
        row_size: elements of a row.
        whole: whether it is the parameter as it is.
    """

    uses: Sequence[Sequence[Use]]
    num_rows: int
    row_size: int
    whole: bool


def regions(passes: Sequence[Sequence[Placed]]) -> list[Region] | None:
    """The uses of one parameter by region, so that its Gram is the sum of theirs; None where overlaps are too large.

    Views that are equal belong together (tied weights, shared modules), views apart do not mix (the experts of a fused
    tensor). Overlapping ones that list elements in the parameter's own order are written out.
    """
    views = {_key(one.view): one.view for found in passes for one in found}
    if not _disjoint(list(views.values())):
        return _written_out(passes, list(views.values()))
    return [_region(passes, key, view) for key, view in views.items()]


def _key(view: View) -> tuple[object, ...]:
    return view.start, view.layout, view.shape[:1]


def _region(passes: Sequence[Sequence[Placed]], key: tuple[object, ...], view: View) -> Region:
    num_rows = view.shape[0] if view.shape else 1
    uses = [[one.use for one in found if _key(one.view) == key] for found in passes]
    return Region(uses, num_rows, view.size // max(num_rows, 1), view.whole)


def _disjoint(views: Sequence[View]) -> bool:
    ends = sorted((view.start, view.start + view.size) for view in views)
    return all(stop <= start for (_, stop), (start, _) in pairwise(ends))


def _written_out(passes: Sequence[Sequence[Placed]], views: Sequence[View]) -> list[Region] | None:
    start, stop = min(view.start for view in views), max(view.start + view.size for view in views)
    samples = sum(found[0].use.num_samples for found in passes if found)
    if any(len(view.layout) > 1 for view in views) or samples * (stop - start) * 8 > _DENSE_BYTES:
        return None
    return [Region([_dense(found, start, stop) for found in passes], stop - start, 1, False)]


def _dense(found: Sequence[Placed], start: int, stop: int) -> list[Use]:
    total: Tensor | None = None
    for one in found:
        rows = one.use.rows(0, one.view.shape[0] if one.view.shape else 1).reshape(one.use.num_samples, -1)
        total = rows.new_zeros(len(rows), stop - start) if total is None else total
        total[:, one.view.start - start : one.view.start - start + one.view.size] += rows
    return [] if total is None else [Dense(_OVERLAPPING, total)]
