"""Loggers that can show more than scalars, each with its sink. None is imported: classes are known by their names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, final

from curvature_callbacks.sinks.base import Sink
from curvature_callbacks.sinks.tensorboard import TensorBoardSink

_FRAMEWORKS: Final = ("lightning", "pytorch_lightning", "transformers")  # whose classes these are


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerType:
    """One logger: how to recognise it in a framework, and the sink that shows what it can.

    Attributes:
        writers: name of a framework's class to the attribute that holds what the sink writes to (None while there is none).
            Classes derived from it are recognised too.
        attribute: what an object of any other class must hold a writer in to be one of them; None where no other class may.
        sink: makes the sink of such a writer.
    """

    writers: Mapping[str, str]
    sink: Callable[[Any], Sink]
    attribute: str | None = None


LOGGERS: Final[Mapping[str, LoggerType]] = MappingProxyType(
    {
        "TensorBoard": LoggerType(
            writers={"TensorBoardLogger": "experiment", "TensorBoardCallback": "tb_writer"},
            sink=TensorBoardSink,
            attribute="tb_writer",
        ),
    }
)


def has_sink(logger: Any) -> bool:
    """Whether `logger` is a framework's own of `LOGGERS`; all others take scalars, which their framework hands them."""
    return _recognised(logger) is not None


def sink_of(logger: Any) -> Sink | None:
    """A sink that writes to `logger`; None where that is not one of `LOGGERS` or has no writer yet."""
    recognised = _recognised(logger) or _alike(logger)
    if recognised is None:
        return None
    logger_type, attribute = recognised
    writer = getattr(logger, attribute)
    return None if writer is None else logger_type.sink(writer)


def _recognised(logger: Any) -> tuple[LoggerType, str] | None:
    """The row of `LOGGERS` and the attribute of `logger` with the writer."""
    classes = [cls.__name__ for cls in type(logger).__mro__ if cls.__module__.partition(".")[0] in _FRAMEWORKS]
    for logger_type in LOGGERS.values():
        for name, attribute in logger_type.writers.items():
            if name in classes:
                return logger_type, attribute
    return None


def _alike(logger: Any) -> tuple[LoggerType, str] | None:
    """The same for an object of a class of the user's own that holds a writer as one of `LOGGERS` does."""
    for logger_type in LOGGERS.values():
        if logger_type.attribute is not None and hasattr(logger, logger_type.attribute):
            return logger_type, logger_type.attribute
    return None
