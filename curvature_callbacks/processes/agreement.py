"""Agreement: the one exception that all processes raise when some of them failed."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError, is_out_of_memory, message_of, named

_CATEGORIES: Final[Mapping[str, type[Exception]]] = {  # of failures, the most decisive first, and what all then raise
    "configuration": ConfigurationError,
    "refused": RefusedError,
    "memory": torch.OutOfMemoryError,
    "linalg": torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    "probe": ProbeError,
}


def failure_text(error: BaseException) -> tuple[str, str]:
    """(category, message); the message names the exception's type when all processes will raise another."""
    return _category(error), message_of(error) if type(error) in _CATEGORIES.values() else named(error)


def common_failure(failures_by_rank: Sequence[tuple[str, str] | None]) -> Exception:
    """The exception of the most decisive category that any process has, with the messages of those that have it.

    Args:
        failures_by_rank: (category, message) of each process by rank, None where it did not fail.
    """
    failures = [(rank, *failure) for rank, failure in enumerate(failures_by_rank) if failure is not None]
    decisive = next(category for category in _CATEGORIES if any(category == each for _, each, _ in failures))
    messages: dict[str, int] = {}  # each once, to the first rank that has it
    for rank, category, message in failures:
        if category == decisive:
            messages.setdefault(message, rank)
    everywhere = len(messages) == 1 and len(failures) == len(failures_by_rank)
    text = "; ".join(message if everywhere else f"process {rank}: {message}" for message, rank in messages.items())
    return _CATEGORIES[decisive](text)


def _category(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "memory"
    return next((category for category, cls in _CATEGORIES.items() if isinstance(error, cls)), "probe")
