"""Fingerprint: what a run's numbers depend on in its arguments, by which a checkpoint's state is known to belong to them.

The text of an object is made of the fields it had in the first version of its table below, and of those of its later fields
that differ from the default recorded here, in the order of the versions they came with. So a field that is added does not
change the fingerprints of checkpoints written before, while a default that is changed does: the value differs from the one
recorded, or is written out in any case.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final, final

DESCRIPTION: Final = "settings"  # where a saved state holds the arguments it was written with

_OWN_MODULES: Final = "curvature_callbacks."

_logger = logging.getLogger("curvature_callbacks")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """A field that came later.

    Attributes:
        version: of the table, in which it came; fields of earlier versions are written first.
        default: it had then. It stays when the class has another default.
    """

    version: int
    default: Any


@final
@dataclass(frozen=True, slots=True)
class FieldTable:
    """The fields of a class, as its text has them.

    Attributes:
        first: those of version 1, always written out, in this order.
        added: those that came later, written out where they differ.
        ignored: those that no number depends on, which may be changed in the middle of a run.
    """

    first: tuple[str, ...]
    added: Mapping[str, Added] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


_EIGEN: Final = ("operator", "sample_unit", "fisher", "num_draws", "sharing")  # the matrix, of measurements of one

# A new field is a new `Added(version=2, default=...)`; nothing that stands here is ever changed. A class that is not here, a
# user's own measurement for one, is written out with all its fields.
FIELD_TABLES: Final[Mapping[str, FieldTable]] = MappingProxyType(
    {
        "Settings": FieldTable(
            (
                "every_n_steps",
                "measure",
                "num_microbatches",
                "microbatch_size",
                "draw",
                "loss_fn",
                "params_filter",
                "block_structure",
                "seed",
                "schedule",
                "probe_dataset",
                "probe_dataloader",
                "max_sequence_length",
            ),
            {"batch_norm": Added(version=2, default=None)},
            ignored=("max_overhead", "max_seconds", "spike"),
        ),
        "FisherSpectrum": FieldTable(
            (
                *("fisher", "sample_unit", "num_draws", "num_targets", "center_gradients", "damping", "max_params_per_block"),
                *("max_sample_grad_norm", "memory_budget", "eigensolve_device", "deterministic"),
            )
        ),
        "TopEigenpairs": FieldTable(
            (*_EIGEN, "k", "which", "tol", "max_matvecs", "max_seconds", "reorth_mode", "warm_start", "per_block")
        ),
        "SpectralDensity": FieldTable((*_EIGEN, "num_probes", "num_steps", "deflate")),
        "EdgeRatio": FieldTable(("tol", "max_matvecs")),
        "GradientNoise": FieldTable(("decay",)),
        "KFACQuality": FieldTable(("sharing", "fisher", "sample_unit", "num_draws", "num_targets", "k")),
        "KFACCoverage": FieldTable(()),
        "EveryNSteps": FieldTable(("n",)),
        "AtSteps": FieldTable(("steps",)),
        "LogSpaced": FieldTable(("per_decade", "first")),
    }
)


def argument_texts(settings: Any, *, instead: Mapping[str, Any]) -> dict[str, str]:
    """Argument to a text that is the same in every process, and another where the value is. Functions are known by name.

    Args:
        settings: an object whose fields stand in a table.
        instead: what is written in place of some values.
    """
    values = {name: instead.get(name, value) for name, value in _written(settings).items()}
    return {name: _text(value) for name, value in values.items()}


def fingerprint(description: Mapping[str, str]) -> str:
    """Eight hexadecimal digits that differ where a description does."""
    return hashlib.sha1(json.dumps(dict(description), sort_keys=True).encode()).hexdigest()[:8]


def warn_of_change(description: Mapping[str, str], others: Iterable[Any]) -> None:
    """Say what differs, when a checkpoint has no state for these arguments but some for others.

    Args:
        description: of the arguments now.
        others: states in the checkpoint that belong to nobody in this run; those without a description are passed over.
    """
    descriptions = [state[DESCRIPTION] for state in others if isinstance(state, Mapping) and DESCRIPTION in state]
    if descriptions:
        changes = min((_changes(each, description) for each in descriptions), key=len)
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
    return re.sub(r" at 0x[0-9a-fA-F]+", "", _repr(value))  # of functions in options: another in every process


def _repr(value: Any) -> str:
    if type(value).__qualname__ not in FIELD_TABLES or not type(value).__module__.startswith(_OWN_MODULES):
        return repr(value)
    return f"{type(value).__qualname__}({', '.join(f'{name}={each!r}' for name, each in _written(value).items())})"


def _written(value: Any) -> dict[str, Any]:
    """Field to value, of the fields in the text of `value`.

    Raises:
        LookupError: a field does not stand in the table: the default that it came with is not known.
    """
    cls = type(value).__qualname__
    table = FIELD_TABLES[cls]
    unlisted = {each.name for each in fields(value)} - {*table.first, *table.added, *table.ignored}
    if unlisted:
        raise LookupError(f"`FIELD_TABLES` lacks {sorted(unlisted)} of `{cls}`: add each as `Added`, with its default of now.")
    later = sorted(table.added, key=lambda name: table.added[name].version)
    differing = [name for name in later if _text(getattr(value, name)) != _text(table.added[name].default)]
    return {name: getattr(value, name) for name in [*table.first, *differing]}
