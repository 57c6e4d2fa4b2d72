"""Common failure: the one exception that all processes raise when some of them failed."""

from collections.abc import Sequence
from typing import Final

import torch

from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError

_KINDS: Final[dict[str, type[Exception]]] = {  # what a failure is to everybody, the most decisive first
    "configuration": ConfigurationError,
    "refused": RefusedError,
    "memory": torch.OutOfMemoryError,
    "linalg": torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    "probe": ProbeError,
}


def described(error: BaseException) -> tuple[str, str]:
    """What kind of failure it is, and its message: with its type, where that is not the one all will raise."""
    return _kind(error), _text(error) if type(error) in _KINDS.values() else named(error)


def named(error: BaseException) -> str:
    """Its type and its message."""
    return f"{type(error).__name__}: {_text(error)}"


def common_failure(described: Sequence[tuple[str, str] | None]) -> Exception:
    """Of the most decisive kind any process has, with its messages.

    Args:
        described: of each process by rank, None where it did not fail.
    """
    failures = [(rank, *failure) for rank, failure in enumerate(described) if failure is not None]
    kind = next(kind for kind in _KINDS if any(kind == each for _, each, _ in failures))
    told: dict[str, int] = {}
    for rank, each, message in failures:
        if each == kind:
            told.setdefault(message, rank)
    everywhere = len(told) == 1 and len(failures) == len(described)
    return _KINDS[kind]("; ".join(text if everywhere else f"process {rank}: {text}" for text, rank in told.items()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(told in _text(error) for told in ("out of memory", "DefaultCPUAllocator"))


def _text(error: BaseException) -> str:
    """Its message. The `__str__` of an exception that is not ours may raise, and nothing may be said or agreed on then."""
    try:
        return str(error)
    except Exception as another:
        return f"its message cannot be read ({type(another).__name__})"


def _kind(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "memory"
    return next((kind for kind, known in _KINDS.items() if isinstance(error, known)), "probe")
