"""Options of an eigensolver for the outer eigenpairs of an operator."""

from dataclasses import dataclass
from typing import Final, Literal, final, get_args

from curvature_callbacks.errors import ConfigurationError, check_choice, check_positive
from curvature_callbacks.linalg.lanczos.wanted import Which

ReorthMode = Literal["auto", "full", "partial", "selective", "off", "thick_restart"]

LEAST_ROOM: Final = 8  # basis vectors beyond the wanted ones that a restarted run needs at least


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LanczosOptions:
    """Options of `lanczos`, which explains each of them, validated once.

    Solvers without a Krylov space (from a Gram, from Kronecker factors) read `k`, `which`, `tol`, `seed` and
    `return_eigenvectors`; their residuals are true ones in any case.

    Raises:
        ConfigurationError: a bad option.
    """

    k: int
    which: Which = "LA"
    tol: float = 1e-3
    max_matvecs: int | None = None
    max_seconds: float | None = None
    reorth_mode: ReorthMode = "auto"
    reorth_window: int = 8
    reorth_period: int = 5
    basis_size: int | None = None
    seed: int = 0
    return_eigenvectors: bool = False
    true_residuals: bool = False

    def __post_init__(self) -> None:
        check_positive("k", self.k)
        check_choice("which", self.which, get_args(Which))
        check_choice("reorth_mode", self.reorth_mode, get_args(ReorthMode))
        if self.max_matvecs is not None and self.max_matvecs < self.k:
            raise ConfigurationError(f"`max_matvecs` must be at least `k`={self.k}, got {self.max_matvecs}.")
        if not self.tol > 0:
            raise ConfigurationError(f"`tol` must be positive, got {self.tol!r}.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigurationError(f"`max_seconds` must be positive, got {self.max_seconds!r}.")
        check_positive("reorth_window", self.reorth_window)
        check_positive("reorth_period", self.reorth_period)
        if self.basis_size is not None:
            self._check_basis_size(self.basis_size)

    @property
    def most_matvecs(self) -> int:
        """Most products of a run: `max_matvecs`, or its default."""
        return max(100, 2 * self.k + 20) if self.max_matvecs is None else self.max_matvecs

    @property
    def asks_for_negative(self) -> bool:
        """Whether the wanted eigenvalues may be negative ones: all ends but the largest alone."""
        return self.which != "LA"

    def _check_basis_size(self, size: int) -> None:
        least = self.k + LEAST_ROOM
        if self.reorth_mode != "thick_restart":
            raise ConfigurationError(f"`basis_size` needs `reorth_mode`='thick_restart', got {self.reorth_mode!r}.")
        if size < least:
            raise ConfigurationError(f"`basis_size` must be at least `k` + {LEAST_ROOM} = {least}, got {size}.")
