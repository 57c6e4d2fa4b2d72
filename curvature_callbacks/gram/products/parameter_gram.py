"""The Gram of one parameter's per-sample gradients from its uses, never holding all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.products.factored import factored_gram
from curvature_callbacks.gram.products.limits import PRODUCT_LIMITS, ProductLimits
from curvature_callbacks.gram.products.regions import Region, regions
from curvature_callbacks.gram.products.scratch import Scratch
from curvature_callbacks.gram.uses.convolution import Convolution
from curvature_callbacks.gram.uses.uses import Dense, Lookup, Use
from curvature_callbacks.linalg.accumulate import gram


@torch.no_grad()
def parameter_gram(
    passes: Sequence[Sequence[Placed]],
    sizes: Sequence[int],
    scratch: Scratch,
    *,
    chosen: Tensor | None = None,
    limits: ProductLimits = PRODUCT_LIMITS,
) -> Tensor | None:
    """`K_ij = g_i . g_j` over all passes, (S, S) float64, S the samples of all of them; None where it takes too much memory.

    Not to be changed in place: parameters with the same gradients may share it.

    The uses of one parameter (tied, shared) are added up before the product, so cross terms are exact. Materialised in chunks
    of slices along the parameter's first axis: `2 N T d_in d_out + 2 N^2 d_in d_out` operations; or factored, see
    `factored_gram`; the cheaper is taken.

    Args:
        passes: for each backward pass the completed uses of the parameter; an empty list means zero gradients.
        sizes: samples of each pass.
        scratch: memory for the chunks.
        chosen: sorted slices of the parameter to count, the sum scaled up to all of them; only where no use is of a part of it.
        limits: sizes of the pieces.

    Cost: as above; extra memory 32 MiB of gradients (64 MiB and 16 MiB of patches for a convolution), or 96 MiB of position
    pairs.
    """
    if not any(passes):
        return torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    if chosen is None and len(passes) == 1 and len(passes[0]) == 1 and isinstance(only := passes[0][0].use, Dense):
        return scratch.gram([only.matrix()])  # most biases and norms: what follows would take longer than their Gram
    parts = regions(passes, limits)
    if parts is None:
        return None
    if chosen is not None and len(parts) == 1 and parts[0].is_parameter:
        return _region_gram(parts[0].restricted(chosen), sizes, scratch, limits) * (parts[0].num_slices / len(chosen))
    total = _region_gram(parts[0], sizes, scratch, limits)
    for region in parts[1:]:
        total = total + _region_gram(region, sizes, scratch, limits)
    return total


def _region_gram(region: Region, sizes: Sequence[int], scratch: Scratch, limits: ProductLimits) -> Tensor:
    factored = factored_gram(region.uses, sizes, scratch, limits)
    if factored is not None:
        return factored
    dense = [uses[0].matrix() for uses in region.uses if len(uses) == 1 and isinstance(uses[0], Dense)]
    if len(dense) == len(region.uses) and (len(dense) == 1 or sum(part.nbytes for part in dense) <= limits.chunk_bytes):
        return scratch.gram(dense)
    if all(isinstance(use, Lookup) for uses in region.uses for use in uses):
        return _materialised(_on_present_slices(region), sizes, scratch, limits)
    return _materialised(region, sizes, scratch, limits)


def _materialised(region: Region, sizes: Sequence[int], scratch: Scratch, limits: ProductLimits) -> Tensor:
    N, size, example = sum(sizes), region.slice_size, _gradient(region.uses)
    total = torch.zeros(N, N, dtype=torch.float64, device=example.device)
    slice_bytes = N * max(size, 1) * example.element_size()
    step = _slices_at_a_time(region, slice_bytes, limits, on_cpu=example.device.type == "cpu")
    for start in range(0, region.num_slices, step):
        stop = min(start + step, region.num_slices)
        buffer = scratch.take(N * (stop - start) * size, example).view(N, stop - start, size)
        for uses, part in zip(region.uses, torch.split(buffer, list(sizes)), strict=True):
            _sum_of_slices(uses, start, stop, part)
        total += gram(buffer.flatten(1))
    return total


def _slices_at_a_time(region: Region, slice_bytes: int, limits: ProductLimits, *, on_cpu: bool) -> int:
    """Slices of the parameter in equal pieces of about the best size; `slice_bytes`: of one slice of all samples' gradients."""
    slow = any(isinstance(use, Convolution) and not use.is_product for uses in region.uses for use in uses)
    count = (limits.convolution_bytes if slow else limits.chunk_bytes) // slice_bytes
    if on_cpu and not slow:
        count = min(count, max(limits.least_slices, limits.least_bytes // slice_bytes))
    pieces = -(-region.num_slices // max(count, 1))
    return -(-region.num_slices // max(pieces, 1)) or 1


def _sum_of_slices(uses: Sequence[Use], start: int, stop: int, out: Tensor) -> None:
    """Per-sample gradients of one pass into `out` (size, stop - start, slice)."""
    if not uses:
        out.zero_()
        return
    uses[0].slices(start, stop, out)
    for use in uses[1:]:
        use.add_slices(out, start, stop)


def _on_present_slices(region: Region) -> Region:
    """The same uses of a table that holds only the slices looked up: a V x d matrix per sample is never formed."""
    lookups = [[use for use in uses if isinstance(use, Lookup)] for uses in region.uses]
    present: Tensor = torch.unique(torch.cat([use.present() for uses in lookups for use in uses]))
    present = present[present >= 0]
    return region.restricted(present)


def _gradient(uses: Sequence[Sequence[Use]]) -> Tensor:
    gradient = next(use for of_pass in uses for use in of_pass).gradient
    assert gradient is not None
    return gradient
