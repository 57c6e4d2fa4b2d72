"""Common failure: the one exception that all processes raise when some of them failed."""

from collections.abc import Sequence
from typing import Final

import torch

from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError, is_out_of_memory, message_of, named

_KINDS: Final[dict[str, type[Exception]]] = {  # what a failure is to everybody, the most decisive first
    "configuration": ConfigurationError,
    "refused": RefusedError,
    "memory": torch.OutOfMemoryError,
    "linalg": torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    "probe": ProbeError,
}


def failure_text(error: BaseException) -> tuple[str, str]:
    """What kind of failure it is, and its message: with its type, where that is not the one all will raise."""
    return _kind(error), message_of(error) if type(error) in _KINDS.values() else named(error)


def common_failure(failures_by_rank: Sequence[tuple[str, str] | None]) -> Exception:
    """Of the most decisive kind any process has, with its messages.

    Args:
        failures_by_rank: of each process by rank, None where it did not fail.
    """
    failures = [(rank, *failure) for rank, failure in enumerate(failures_by_rank) if failure is not None]
    kind = next(kind for kind in _KINDS if any(kind == each for _, each, _ in failures))
    told: dict[str, int] = {}
    for rank, each, message in failures:
        if each == kind:
            told.setdefault(message, rank)
    everywhere = len(told) == 1 and len(failures) == len(failures_by_rank)
    return _KINDS[kind]("; ".join(text if everywhere else f"process {rank}: {text}" for text, rank in told.items()))


def _kind(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "memory"
    return next((kind for kind, known in _KINDS.items() if isinstance(error, known)), "probe")
