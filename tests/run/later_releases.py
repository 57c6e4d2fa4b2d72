"""Measurements as a later release might have them: with a field more, with another default."""

import dataclasses
from typing import Any


def with_field(measurement: type, *, default: int) -> Any:
    """The class with one more field, `added`."""
    return _changed(measurement, ("added", int, default))


def with_default(measurement: type, **default: float) -> Any:
    """The class with another default of one field."""
    ((name, value),) = default.items()
    return _changed(measurement, (name, type(value), value))


def _changed(measurement: type, field: tuple[str, type, Any]) -> Any:
    name, annotation, default = field
    return dataclasses.make_dataclass(
        measurement.__name__,
        [(name, annotation, dataclasses.field(default=default))],
        bases=(measurement,),
        namespace={"__module__": measurement.__module__},
        frozen=True,
        kw_only=True,
    )
