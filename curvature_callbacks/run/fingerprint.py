"""Fingerprint: what a run's numbers depend on in its arguments, by which a checkpoint's state is known to belong to them."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

DESCRIPTION: Final = "settings"  # where a saved state holds the arguments it was written with

_logger = logging.getLogger("curvature_callbacks")


def settings_text(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Argument to a text that is the same in every process, and another where the value is. Functions are known by name."""
    return {name: _text(value) for name, value in arguments.items()}


def fingerprint(description: Mapping[str, str]) -> str:
    """Eight hexadecimal digits."""
    return hashlib.sha1(json.dumps(dict(description), sort_keys=True).encode()).hexdigest()[:8]


def warn_of_change(description: Mapping[str, str], others: Iterable[Any]) -> None:
    """Say what differs, when a checkpoint has no state for these arguments but some for others.

    Args:
        description: of the arguments now.
        others: states in the checkpoint that belong to nobody in this run; those without a description are passed over.
    """
    found = [state[DESCRIPTION] for state in others if isinstance(state, Mapping) and DESCRIPTION in state]
    if found:
        changes = min((_changes(each, description) for each in found), key=len)
        _logger.warning(
            "the curvature callback that wrote this checkpoint had other arguments (%s): its averages, start vectors and "
            "schedule are not used, this one begins anew. Training is not affected.",
            "; ".join(changes),
        )


def _changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = [*now, *(name for name in saved if name not in now)]
    return [f"`{name}` {saved.get(name)}, now {now.get(name)}" for name in names if saved.get(name) != now.get(name)]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # of functions in options: another in every process
