"""States: what measurements carry from probe to probe, and the part of it that a checkpoint can hold."""

from collections.abc import Mapping
from typing import Any, Final, final

from torch import Tensor

_PLAIN: Final = (bool, int, float, str, type(None))  # what JSON and `torch.load(weights_only=True)` give back


@final
class States:
    """The latest state of each measurement."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._plain: dict[str, Any] = {}  # of those that can be saved, without their tensors

    def __contains__(self, name: str) -> bool:
        return name in self._latest

    def __getitem__(self, name: str) -> Any:
        return self._latest[name]

    def __setitem__(self, name: str, state: Any) -> None:
        self._latest[name] = state
        self._plain.pop(name, None)
        if _can_be_saved(state):  # looked at here, not in `saved`, which the Hugging Face Trainer asks for at every step
            self._plain[name] = _without_tensors(state)

    def saved(self, *, tensors: bool) -> dict[str, Any]:
        """The states made of dicts, lists, tuples, strings, numbers, None and tensors only.

        Args:
            tensors: whether the checkpoint can hold tensors; in their place stands None otherwise, and a state that is nothing
                but a tensor is left out.
        """
        if tensors:
            return {name: self._latest[name] for name in sorted(self._plain)}
        return {name: self._plain[name] for name in sorted(self._plain) if not isinstance(self._latest[name], Tensor)}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `saved` gave in an earlier run; other measurements begin anew."""
        self._latest, self._plain = {}, {}
        for name, state in saved.items():
            self[name] = state


def _can_be_saved(state: Any) -> bool:
    if type(state) is dict:
        return all(isinstance(key, str) and _can_be_saved(value) for key, value in state.items())
    if type(state) in (list, tuple):
        return all(map(_can_be_saved, state))
    return type(state) in _PLAIN or type(state) is Tensor


def _without_tensors(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _without_tensors(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_without_tensors, state))
    return None if isinstance(state, Tensor) else state
