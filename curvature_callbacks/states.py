"""States: what measurements carry from probe to probe, and the part of it that a checkpoint can hold."""

from collections.abc import Mapping
from typing import Any, Final, final

_PLAIN: Final = (bool, int, float, str, type(None))  # what JSON and `torch.load(weights_only=True)` give back


@final
class States:
    """The latest state of each measurement."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._plain: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._latest

    def __getitem__(self, name: str) -> Any:
        return self._latest[name]

    def __setitem__(self, name: str, state: Any) -> None:
        self._latest[name] = state
        self._plain.discard(name)
        if _is_plain(state):  # looked at here, not in `plain`, which the Hugging Face Trainer asks for at every step
            self._plain.add(name)

    def plain(self) -> dict[str, Any]:
        """The states made of dicts, lists, tuples, strings, numbers and None only."""
        return {name: self._latest[name] for name in sorted(self._plain)}

    def load(self, plain: Mapping[str, Any]) -> None:
        """Continue from what `plain` gave in an earlier run; other measurements begin anew."""
        self._latest, self._plain = dict(plain), set(plain)


def _is_plain(state: Any) -> bool:
    if type(state) is dict:
        return all(isinstance(key, str) and _is_plain(value) for key, value in state.items())
    if type(state) in (list, tuple):
        return all(map(_is_plain, state))
    return type(state) in _PLAIN
