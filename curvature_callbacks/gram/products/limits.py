"""Limits: how much memory the Gram of one parameter may take, and in pieces of what size it is worked out."""

from dataclasses import dataclass
from typing import Final, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ProductLimits:
    """Budgets of the Gram of one parameter. All give the same numbers but for rounding.

    Attributes:
        chunk_bytes: of per-sample gradients materialised at a time.
        least_bytes: the same on a CPU, where small pieces stay in its cache (0.02 of a pass with a ViT) ...
        least_slices: ... but no fewer slices of the parameter than products need to be fast.
        convolution_bytes: the same where a convolution has to be run for each chunk.
        overlap_bytes: of per-sample gradients written out where views of a parameter overlap.
        position_pairs: most pairs of positions held: 32 MiB in float64, three of which exist at a time.
        pixel_bytes: of pairs of pixels held at a time, two to three times over.
        fewest_samples: height of a tile of pairs of pixels: below that a product loses more speed than symmetry saves.
    """

    chunk_bytes: int = 32 << 20
    least_bytes: int = 4 << 20
    least_slices: int = 128
    convolution_bytes: int = 64 << 20
    overlap_bytes: int = 256 << 20
    position_pairs: int = 1 << 22
    pixel_bytes: int = 16 << 20
    fewest_samples: int = 16


PRODUCT_LIMITS: Final = ProductLimits()
