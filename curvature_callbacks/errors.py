"""Errors with a fixed consequence: stop before step 1, refuse for good, or skip this probe."""

from collections.abc import Iterable
from typing import Any, Final, final

import torch

LinAlgError: Final = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@final
class ConfigurationError(ValueError):
    """What the user asked for cannot be measured; raised before step 1 and never swallowed."""


@final
class RefusedError(RuntimeError):
    """A number here would be silently wrong; the measurement is switched off for the rest of the run."""


@final
class ProbeError(RuntimeError):
    """This probe has no answer (a non-finite loss, no valid target); the next one may have.

    Of the draw that is checked before step 1 it stops the run as a `ConfigurationError`: no probe has shown yet that any has.
    """


def check_choice(parameter: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a `ConfigurationError` that lists all `choices` unless `value` is one of them."""
    listed = tuple(choices)
    if value not in listed:
        raise ConfigurationError(f"`{parameter}` must be one of {', '.join(map(repr, listed))}, got {value!r}.")


def check_positive(parameter: str, value: Any) -> None:
    """Raise a `ConfigurationError` unless `value` is an integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"`{parameter}` must be an integer of at least 1, got {value!r}.")


def check_share(parameter: str, value: Any) -> None:
    """Raise a `ConfigurationError` unless `value` is None or a number between 0 and 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1):
        raise ConfigurationError(f"`{parameter}` must be a share of wall time between 0 and 1, or None, got {value!r}.")


def check_seconds(parameter: str, value: Any) -> None:
    """Raise a `ConfigurationError` unless `value` is None or a positive number."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise ConfigurationError(f"`{parameter}` must be a positive number of seconds, or None, got {value!r}.")


def named(error: BaseException) -> str:
    """`ProbeError: the loss is nan`, the type of an error before its message."""
    return f"{type(error).__name__}: {message_of(error)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("out of memory", "DefaultCPUAllocator")  # what accelerators and the allocator of CPUs say
    return isinstance(error, RuntimeError) and any(word in message_of(error) for word in words)


def message_of(error: BaseException) -> str:
    """The message of an error. The `__str__` of an exception that is not ours may raise; processes have to agree on it."""
    try:
        return str(error)
    except Exception as another:
        return f"its message cannot be read ({type(another).__name__})"
