"""Limits of Lanczos: budgets of a Lanczos run that change what it costs, not what it finds."""

from dataclasses import dataclass
from typing import Final, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LanczosLimits:
    """Budgets that nobody but a test has had to change.

    Attributes:
        look_every: most steps between looks at the pairs; where reads are not free the only host synchronisations.
        restart_columns: columns of the basis that a restart rotates at a time, so that it takes no second basis.
        basis_bytes: memory of the basis from which on `auto` restarts; None: what the device has to spare.
    """

    look_every: int = 5
    restart_columns: int = 1 << 16
    basis_bytes: int | None = None


DEFAULT_LIMITS: Final = LanczosLimits()
