"""Which rows of its dataset the sampler of a loader can draw."""

import logging
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from curvature_callbacks.library_internals.frameworks import sampler_behind
from curvature_callbacks.processes.group import current_world

_logger = logging.getLogger("curvature_callbacks")


def rows_of(loader: Any) -> Any:
    """What the loader's sampler can draw, None for all rows of its dataset."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, list | tuple):
        return [row for batch in batches for row in batch]
    sampler = _innermost(getattr(loader, "sampler", None) if batches is None else batches, loader.dataset)
    if isinstance(sampler, RandomSampler | SequentialSampler):
        rows: Any = range(len(sampler.data_source))
    elif isinstance(sampler, SubsetRandomSampler):
        rows = sampler.indices
    elif isinstance(sampler, WeightedRandomSampler):
        rows = (sampler.weights > 0).nonzero().flatten().tolist()
    elif isinstance(sampler, list | tuple | range | torch.Tensor) or type(sampler).__module__ == "numpy":
        rows = sampler
    else:
        _warn_of_fewer(sampler, loader)
        return None
    return None if isinstance(rows, range) and rows == range(len(loader.dataset)) else rows


def groups_of(loader: Any) -> list[range] | None:
    """The parts of the loader's rows that its batches are taken from, one part a batch; None where batches are of all rows.

    Of several data sets in one, whose batch sampler is another than PyTorch's, each batch is taken to be of one data set: so
    they are where each has columns or a loss of its own.
    """
    dataset: Any = getattr(loader, "dataset", None)
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):  # accelerate's shards of batches
        batches = batches.batch_sampler
    if not isinstance(dataset, ConcatDataset) or batches is None or type(batches) is BatchSampler:
        return None
    if isinstance(batches, list | tuple):
        return None
    ends = dataset.cumulative_sizes
    return [range(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True) if stop > start]


def _innermost(sampler: Any, dataset: Any) -> Any:
    """The sampler of rows in batches of them, in accelerate's shards of such batches and in the shards of Lightning.

    The shards of PyTorch are of the rows of a dataset, those of Lightning of a dataset made of the entries of a sampler.
    """
    within: Any = None
    if isinstance(sampler, BatchSampler):
        within = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
    elif isinstance(sampler, DistributedSampler):
        sharded = getattr(sampler, "dataset", dataset)
        within = SequentialSampler(dataset) if sharded is dataset else sampler_behind(sharded)
    return sampler if within is None else _innermost(within, dataset)


def _warn_of_fewer(sampler: Any, loader: Any) -> None:
    """Say that probes draw from all rows, where `sampler` has fewer, but for batches and processes that are not full."""
    try:
        size = getattr(sampler, "batch_size") if sampler is loader.batch_sampler else 1  # noqa: B009 - of a class not known
        is_fewer = (len(sampler) + 1) * size * current_world().size <= len(loader.dataset)
    except (TypeError, AttributeError, NotImplementedError):  # it need not have a length
        return
    if is_fewer and current_world().rank == 0:
        _logger.warning(
            "curvature probes draw from the whole dataset of %d rows: which of them `%s` draws, of length %d, is not known. "
            "Pass `probe_dataset=` or `probe_dataloader=` (of a `Subset`, say) to measure on others. Training is not affected.",
            len(loader.dataset),
            type(sampler).__name__,
            len(sampler),
        )
