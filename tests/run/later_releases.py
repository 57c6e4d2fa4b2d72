"""Measurements as a later release might have them: with a field more, with another default."""

import dataclasses
from typing import Any

from curvature_callbacks.run import fingerprint
from curvature_callbacks.run.fingerprint import FIELD_TABLES, Added


def record_field(monkeypatch: Any, measurement: type, *, default: int) -> None:
    """Write the field of `with_field` into the table of fingerprints, as its release would."""
    table = FIELD_TABLES[measurement.__name__]
    recorded = dataclasses.replace(table, added={"added": Added(version=2, default=default)})
    monkeypatch.setattr(fingerprint, "FIELD_TABLES", {**FIELD_TABLES, measurement.__name__: recorded})


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
