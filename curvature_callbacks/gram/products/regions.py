"""Regions: disjoint parts of a parameter, each with all the uses whose gradients lie in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, final

from torch import Tensor

from curvature_callbacks.gram.capture.derived import Placed, View
from curvature_callbacks.gram.products.limits import PRODUCT_LIMITS, ProductLimits
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.uses import Dense, Use

_OVERLAPPING: Final = Operation("views that overlap")


@final
@dataclass(frozen=True, slots=True)
class Region:
    """A part of a parameter.

    Attributes:
        uses: for each pass.
        num_slices: size of the part's first axis.
        slice_size: elements of a slice.
        is_parameter: whether it is the parameter itself.
    """

    uses: Sequence[Sequence[Use]]
    num_slices: int
    slice_size: int
    is_parameter: bool

    def restricted(self, chosen: Tensor) -> "Region":
        """The slices `chosen` (sorted indices) of the part."""
        uses = [[use.restricted(chosen) for use in of_pass] for of_pass in self.uses]
        return Region(uses, len(chosen), self.slice_size, self.is_parameter)


def regions(passes: Sequence[Sequence[Placed]], limits: ProductLimits = PRODUCT_LIMITS) -> list[Region] | None:
    """The uses of one parameter by region, so that its Gram is the sum of theirs; None where overlaps are too large.

    Views that are equal belong together (tied weights, shared modules), views apart do not mix (the experts of a fused
    tensor). Overlapping ones that list elements in the parameter's own order are written out.
    """
    views = {_elements(placed.view): placed.view for uses in passes for placed in uses}
    if not _disjoint(list(views.values())):
        return _written_out(passes, list(views.values()), limits)
    return [_region(passes, key, view) for key, view in views.items()]


def _elements(view: View) -> tuple[object, ...]:
    return view.start, view.layout, view.shape[:1]


def _region(passes: Sequence[Sequence[Placed]], key: tuple[object, ...], view: View) -> Region:
    num_slices = view.shape[0] if view.shape else 1
    uses = [[placed.use for placed in of_pass if _elements(placed.view) == key] for of_pass in passes]
    return Region(uses, num_slices, view.size // max(num_slices, 1), view.is_parameter)


def _disjoint(views: Sequence[View]) -> bool:
    ends = sorted((view.start, view.start + view.size) for view in views)
    return all(stop <= start for (_, stop), (start, _) in pairwise(ends))


def _written_out(passes: Sequence[Sequence[Placed]], views: Sequence[View], limits: ProductLimits) -> list[Region] | None:
    start, stop = min(view.start for view in views), max(view.start + view.size for view in views)
    samples = sum(uses[0].use.num_samples for uses in passes if uses)
    if any(len(view.layout) > 1 for view in views) or samples * (stop - start) * 8 > limits.overlap_bytes:
        return None
    return [Region([_gradients_of(uses, start, stop) for uses in passes], stop - start, 1, False)]


def _gradients_of(uses: Sequence[Placed], start: int, stop: int) -> list[Use]:
    """The per-sample gradients of the elements `start:stop`, from all uses of one pass."""
    total: Tensor | None = None
    for placed in uses:
        view, use = placed.view, placed.use
        gradients = use.slices(0, view.shape[0] if view.shape else 1).reshape(use.num_samples, -1)
        total = gradients.new_zeros(len(gradients), stop - start) if total is None else total
        total[:, view.start - start : view.start - start + view.size] += gradients
    return [] if total is None else [Dense(_OVERLAPPING, total)]
