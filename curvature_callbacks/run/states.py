"""States: what measurements carry from probe to probe, and the part of it that a checkpoint can hold."""

import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

_SAVED_AS_THEY_ARE: Final = (bool, int, float, str, type(None))  # what JSON and `torch.load(weights_only=True)` give back
_WITH_TENSORS: Final = "whole"  # a key of files beside checkpoints: not to be renamed

_logger = logging.getLogger("curvature_callbacks")


@final
class States:
    """The state each measurement returned at its latest probe."""

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
        if _can_be_saved(state):  # found out now, not in `saved`, which the Hugging Face Trainer asks for at every step
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


def save_with_tensors(path: Path, *, state: dict[str, Any], plain: dict[str, Any]) -> None:
    """Write a monitor's state with its tensors beside a checkpoint in JSON, which holds it without them; warn where it fails.

    Args:
        path: of the file.
        state: with tensors.
        plain: what the checkpoint in JSON holds, by which `load_with_tensors` knows that the two belong together.
    """
    try:
        torch.save({"plain": plain, _WITH_TENSORS: state}, path)
    except (OSError, RuntimeError) as error:  # a full disk
        _logger.warning("the state of curvature measurements was not saved to %s: %s. Training is not affected.", path, error)


def load_with_tensors(paths: Sequence[Path], plain: Any) -> dict[str, Any] | None:
    """The state with its tensors, from the first file that belongs to the checkpoint whose JSON says `plain`, if any."""
    for path in filter(Path.exists, paths):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _logger.warning("the state of curvature measurements in %s cannot be read, its vectors begin anew: %s", path, error)
            continue
        if json.loads(json.dumps(content["plain"])) == json.loads(json.dumps(plain)):
            state: dict[str, Any] = content[_WITH_TENSORS]
            return state
    _logger.warning(
        "%s is missing or of another checkpoint: the vectors of curvature measurements begin anew. Training is not affected.",
        paths[-1].name,
    )
    return None


def _can_be_saved(state: Any) -> bool:
    if type(state) is dict:
        return all(isinstance(key, str) and _can_be_saved(value) for key, value in state.items())
    if type(state) in (list, tuple):
        return all(map(_can_be_saved, state))
    return type(state) in _SAVED_AS_THEY_ARE or type(state) is Tensor


def _without_tensors(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _without_tensors(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_without_tensors, state))
    return None if isinstance(state, Tensor) else state
