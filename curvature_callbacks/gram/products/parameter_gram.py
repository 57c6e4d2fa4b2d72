"""The Gram of one parameter's per-sample gradients from its uses, never holding all of them."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.products.factored import factored_gram
from curvature_callbacks.gram.products.regions import Region, regions
from curvature_callbacks.gram.products.scratch import Scratch
from curvature_callbacks.gram.uses.convolution import Convolution
from curvature_callbacks.gram.uses.uses import Dense, Lookup, Use
from curvature_callbacks.linalg.accumulate import gram

_CHUNK_BYTES: Final = 32 << 20  # of per-sample gradients materialised at a time
_LEAST_BYTES: Final = 4 << 20  # on a CPU, where small pieces stay in its cache (0.02 of a pass with a ViT) ...
_LEAST_ROWS: Final = 128  # ... but no smaller than products need to be fast
_CONVOLUTION_BYTES: Final = 64 << 20  # the same where a convolution has to be run for each chunk


@torch.no_grad()
def parameter_gram(
    passes: Sequence[Sequence[Placed]], sizes: Sequence[int], scratch: Scratch, *, rows: Tensor | None = None
) -> Tensor | None:
    """`K_ij = g_i . g_j` over all passes, (S, S) float64, S the samples of all of them; None where it takes too much memory.

    Not to be changed in place: parameters with the same gradients may share it.

    The uses of one parameter (tied, shared) are added up before the product, so cross terms are exact. Materialised in chunks
    of rows: `2 N T d_in d_out + 2 N^2 d_in d_out` operations; or factored, see `factored_gram`; the cheaper is taken.

    Args:
        passes: for each backward pass the completed uses of the parameter; an empty list means zero gradients.
        sizes: samples of each pass.
        scratch: memory for the chunks.
        rows: sorted rows of the parameter to count, the sum scaled up to all of them; only where it is used as a whole.

    Cost: as above; extra memory 32 MiB of gradients (64 MiB and 16 MiB of patches for a convolution), or 96 MiB of position
    pairs.
    """
    if not any(passes):
        return torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    if rows is None and len(passes) == 1 and len(passes[0]) == 1 and isinstance(only := passes[0][0].use, Dense):
        return scratch.gram([only.whole()])  # most biases and norms: what follows would take longer than their Gram
    found = regions(passes)
    if found is None:
        return None
    if rows is not None and len(found) == 1 and found[0].whole:
        part = Region([[use.restricted(rows) for use in uses] for uses in found[0].uses], len(rows), found[0].row_size, True)
        return _region_gram(part, sizes, scratch) * (found[0].num_rows / len(rows))
    total = _region_gram(found[0], sizes, scratch)
    for region in found[1:]:
        total = total + _region_gram(region, sizes, scratch)
    return total


def _region_gram(region: Region, sizes: Sequence[int], scratch: Scratch) -> Tensor:
    factored = factored_gram(region.uses, sizes, scratch)
    if factored is not None:
        return factored
    dense = [found[0].whole() for found in region.uses if len(found) == 1 and isinstance(found[0], Dense)]
    if len(dense) == len(region.uses) and (len(dense) == 1 or sum(part.nbytes for part in dense) <= _CHUNK_BYTES):
        return scratch.gram(dense)
    if all(isinstance(use, Lookup) for found in region.uses for use in found):
        return _materialised(_on_present_rows(region), sizes, scratch)
    return _materialised(region, sizes, scratch)


def _materialised(region: Region, sizes: Sequence[int], scratch: Scratch) -> Tensor:
    N, row, example = sum(sizes), region.row_size, _gradient(region.uses)
    total = torch.zeros(N, N, dtype=torch.float64, device=example.device)
    step = _rows_at_a_time(region, N * max(row, 1) * example.element_size(), on_cpu=example.device.type == "cpu")
    for start in range(0, region.num_rows, step):
        stop = min(start + step, region.num_rows)
        buffer = scratch.take(N * (stop - start) * row, example).view(N, stop - start, row)
        for uses, piece in zip(region.uses, torch.split(buffer, list(sizes)), strict=True):
            _sum_of_rows(uses, start, stop, piece)
        total += gram(buffer.flatten(1))
    return total


def _rows_at_a_time(region: Region, row_bytes: int, *, on_cpu: bool) -> int:
    """Rows of the parameter in equal pieces of about the best size; `row_bytes`: of one row of all samples' gradients."""
    slow = any(isinstance(use, Convolution) and not use.is_product for uses in region.uses for use in uses)
    rows = (_CONVOLUTION_BYTES if slow else _CHUNK_BYTES) // row_bytes
    if on_cpu and not slow:
        rows = min(rows, max(_LEAST_ROWS, _LEAST_BYTES // row_bytes))
    pieces = -(-region.num_rows // max(rows, 1))
    return -(-region.num_rows // max(pieces, 1)) or 1


def _sum_of_rows(uses: Sequence[Use], start: int, stop: int, out: Tensor) -> None:
    """Per-sample gradients of one pass into `out` (size, stop - start, row)."""
    if not uses:
        out.zero_()
        return
    uses[0].rows(start, stop, out)
    for use in uses[1:]:
        use.add_rows(out, start, stop)


def _on_present_rows(region: Region) -> Region:
    """The same uses of a table that holds only the rows looked up: a V x d matrix per sample is never formed."""
    lookups = [[use for use in found if isinstance(use, Lookup)] for found in region.uses]
    present: Tensor = torch.unique(torch.cat([use.present_rows() for found in lookups for use in found]))
    present = present[present >= 0]
    return Region([[use.on(present) for use in found] for found in lookups], len(present), region.row_size, region.whole)


def _gradient(uses: Sequence[Sequence[Use]]) -> Tensor:
    gradient = next(use for found in uses for use in found).gradient
    assert gradient is not None
    return gradient
