"""How many rows a training batch of one process has, by its loader."""

from statistics import median_high
from typing import Any


def training_batch_size(loader: Any) -> int | None:
    """Rows of a batch that `loader` gives to this process; None where that is not known. Nothing is iterated.

    Where batches differ in size it is that of the one in the middle, of a list of them, else their mean by the lengths of
    sampler and data set.
    """
    size = getattr(loader, "batch_size", None)
    batches = getattr(loader, "batch_sampler", None)
    if _is_size(size) or batches is None:
        return size if _is_size(size) else None
    if isinstance(batches, list | tuple):
        return median_high(map(len, batches)) if batches else None
    size = getattr(batches, "batch_size", None)
    if not _is_size(size):
        return _mean_size(batches, loader)
    is_split = getattr(batches, "split_batches", False)  # accelerate's: each process has a part of every batch
    return max(1, size // batches.num_processes) if is_split else size


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _mean_size(batches: Any, loader: Any) -> int | None:
    try:
        num_batches, num_rows = len(batches), len(loader.dataset)
    except (TypeError, AttributeError, NotImplementedError):
        return None
    return max(1, round(num_rows / num_batches)) if num_batches else None
