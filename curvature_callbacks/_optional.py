"""Presence of optional packages, without importing them."""

from importlib.util import find_spec


def is_available(package: str) -> bool:
    """Whether `package` is installed; never imports it, so that a broken installation shows its own traceback later."""
    return find_spec(package) is not None


def require(package: str, *, extra: str) -> None:
    """Raise an `ImportError` that names the extra to install unless `package` is installed."""
    if not is_available(package):
        raise ImportError(f"`{package}` is needed here and not installed: pip install 'curvature-callbacks[{extra}]'.")
