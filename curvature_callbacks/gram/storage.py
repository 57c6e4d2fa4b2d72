"""Storage: where the factors of earlier passes wait until the last pass completes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch

from curvature_callbacks.device import device_budget, host_budget
from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.uses.uses import Dense, OuterProduct, Use

_CPU: Final = torch.device("cpu")
_Bytes = dict[int, int]  # address of a storage to its size: shared ones count once


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes that the factors of earlier passes may take.

    Attributes:
        device_bytes: on the model's device.
        host_bytes: on the host beyond that; 0 where the model lives there.
    """

    device_bytes: int
    host_bytes: int = 0


def memory_budget(device: torch.device, device_bytes: int | None = None) -> MemoryBudget:
    """The budget for a model on `device`: 2 GiB on a CPU; on an accelerator half of its free memory, then of the host's."""
    on_device = device_budget(device) if device_bytes is None else device_bytes
    return MemoryBudget(device_bytes=on_device, host_bytes=0 if device.type == "cpu" else host_budget())


@final
class Storage:
    """Keeps completed uses: on the device while they fit, then on the host; says what has to wait for another round.

    A use is kept as per-sample gradients where these are fewer numbers than its factors, `min(T (d_in + d_out), d_in d_out)` a
    sample, unless the factors themselves are wanted (K-FAC). Tensors that several uses share (the input of queries, keys and
    values) count once on the device.

    Attributes:
        captured: bytes of the uses as they came, shared tensors as often as they did.
    """

    def __init__(self, budget: MemoryBudget, *, factors_wanted: bool, device: torch.device = _CPU) -> None:
        self._budget = budget
        self._home = device
        self._factors_wanted = factors_wanted
        self._device: dict[str, _Bytes] = {}
        self._host: dict[str, _Bytes] = {}
        self._rounds = 1
        self.captured = 0

    @property
    def mode(self) -> str:
        """How it was kept: `one pass` (nothing to keep), `factors on device`, `factors on host`, `k block groups`."""
        if self._rounds > 1:
            return f"{self._rounds} block groups"
        if any(self._host.values()):
            return "factors on host"
        return "factors on device" if self._device else "one pass"

    def keep(self, name: str, found: Sequence[Placed]) -> list[Placed]:
        """The same uses in the form and place in which they wait."""
        self.captured += sum(tensor.nbytes for one in found for tensor in one.use.tensors())
        kept = [one if self._factors_wanted else Placed(one.view, _smaller(one.use)) for one in found]
        own = self._device.setdefault(name, {})
        needed = {**own, **_bytes(kept)}
        if self._budget.host_bytes == 0 or _total([*self._device.values(), needed]) <= self._budget.device_bytes:
            own.update(needed)
            return kept
        moved = [Placed(one.view, one.use.moved(_CPU)) for one in kept]
        self._host.setdefault(name, {}).update(_bytes(moved))
        return moved

    def returned(self, name: str, passes: list[list[Placed]]) -> list[list[Placed]]:
        """Everything kept of a parameter, on the model's device again."""
        if not self._host.get(name):
            return passes
        return [[Placed(one.view, one.use.moved(self._home)) for one in found] for found in passes]

    def postponed(self, names: Iterable[str], share: float) -> list[str]:
        """Names, from the end, that cannot be kept until the last pass when `share` of all passes are done."""
        limit = (self._budget.device_bytes + self._budget.host_bytes) * share
        staying: _Bytes = {}
        later = []
        for position, name in enumerate(names):
            needed = {**self._device.get(name, {}), **self._host.get(name, {})}
            if position and needed and _total([staying, needed]) > limit:
                later.append(name)
            else:
                staying.update(needed)
        for name in later:
            self._device.pop(name, None)
            self._host.pop(name, None)
        return later

    def start_round(self) -> None:
        """Forget what the last round kept and count another."""
        self._device.clear()
        self._host.clear()
        self._rounds += 1


def _bytes(found: Iterable[Placed]) -> _Bytes:
    tensors = [tensor for one in found for tensor in one.use.tensors()]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _total(parts: Iterable[_Bytes]) -> int:
    together: _Bytes = {}
    for part in parts:
        together.update(part)
    return sum(together.values())


def _smaller(use: Use) -> Use:
    if not isinstance(use, OuterProduct):
        return use
    left, right = use.factors()
    _, T, rows = left.shape
    columns = right.shape[2]
    return Dense(use.operation, use.rows(0, rows)) if rows * columns < T * (rows + columns) else use
