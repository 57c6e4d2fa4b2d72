"""Failures: what went wrong in the probes of a run, warned of once, and which measurements are therefore switched off."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, final

from curvature_callbacks.errors import RefusedError, named
from curvature_callbacks.record import Record

_MAX_FAILURES: Final = 3  # failures in a row after which a measurement is switched off

_logger = logging.getLogger("curvature_callbacks")


@final
class Failures:
    """Counts the failures of each measurement and reports the first.

    Attributes:
        counts: measurement to its failures in a row.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._warned: set[str] = set()

    @property
    def switched_off(self) -> set[str]:
        """The measurements that are not tried again: three failures in a row, or one refusal."""
        return {name for name, count in self.counts.items() if count >= _MAX_FAILURES}

    def load(self, counts: Mapping[str, int]) -> None:
        """Continue from the `counts` of an earlier run."""
        self.counts = dict(counts)

    def succeeded(self, name: str) -> None:
        """End the row of failures of `name`: its next one counts as the first."""
        self.counts[name] = 0

    def failed(self, name: str, step: int, error: Exception) -> Record:
        """Count a failed measurement, which may switch it off; its record."""
        self.counts[name] = _MAX_FAILURES if isinstance(error, RefusedError) else self.counts.get(name, 0) + 1
        return self.recorded(name, step, error)

    def recorded(self, name: str, step: int, error: Exception) -> Record:
        """The record of a failure that does not count towards switching off; a warning, the first time."""
        if name not in self._warned:
            self._warned.add(name)
            off = name in self.switched_off
            _logger.warning(
                "curvature measurement `%s` failed at step %d: %s. Training is not affected; %s. This is said once.",
                name,
                step,
                _cause(error),
                "it is switched off" if off else "it is tried again at the next probe",
            )
        return Record(step=step, measurement=name, error=_cause(error))

    def warn_once(self, key: str, what: str, error: Exception) -> None:
        """Warn of what is no measurement's failure, once for every `key`."""
        if key not in self._warned:
            self._warned.add(key)
            _logger.warning("%s: %s. Training is not affected. This is said once.", what, _cause(error))

    @contextmanager
    def reported(self, key: str, what: str, *, is_known: bool = False) -> Iterator[None]:
        """An exception inside ends here and is warned of, once for every `key`; interrupts pass.

        Args:
            key: of which there is one warning a run.
            what: went wrong.
            is_known: whether a warning has named the cause already; a line for debugging is enough then.
        """
        try:
            yield
        except Exception as error:
            if is_known:
                _logger.debug("%s: %s", what, _cause(error))
            else:
                self.warn_once(key, what, error)


def _cause(error: Exception) -> str:
    return named(error).rstrip(".")
