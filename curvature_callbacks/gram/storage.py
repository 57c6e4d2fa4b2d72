"""Storage: where the factors of earlier passes wait until the last pass completes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import torch

from curvature_callbacks.device import device_budget, host_budget
from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.uses.uses import Dense, OuterProduct, Use

KeptForm = Literal["smaller", "factors", "gradients"]

_CPU: Final = torch.device("cpu")
_Bytes = dict[int, int]  # address of a storage to its size: shared ones count once


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Bytes that the factors of earlier passes may take.

    Attributes:
        device_bytes: on the model's device.
        host_bytes: on the host beyond that; 0 for a model on the host.
    """

    device_bytes: int
    host_bytes: int = 0


def memory_budget(device: torch.device, device_bytes: int | None = None) -> MemoryBudget:
    """The budget for a model on `device`: 2 GiB on a CPU; on an accelerator half of its free memory, then of the host's."""
    on_device = device_budget(device) if device_bytes is None else device_bytes
    return MemoryBudget(device_bytes=on_device, host_bytes=0 if device.type == "cpu" else host_budget())


@final
class Storage:
    """Keeps completed uses: on the device while they fit, then on the host; says which parameters have to be postponed.

    Tensors that several uses share (the input of queries, keys and values) count once on the device.

    Args:
        budget: what the kept uses may take.
        form: of a linear layer's use: its factors, per-sample gradients, or whichever are fewer numbers,
            `min(T (d_in + d_out), d_in d_out)` a sample.
        device: the model's.

    Attributes:
        captured: bytes of the uses as they came, shared tensors as often as they did.
    """

    def __init__(self, budget: MemoryBudget, *, form: KeptForm = "smaller", device: torch.device = _CPU) -> None:
        self._budget = budget
        self._home = device
        self._form = form
        self._device: dict[str, _Bytes] = {}
        self._host: dict[str, _Bytes] = {}
        self._rounds = 1
        self.captured = 0

    @property
    def mode(self) -> str:
        """How uses were kept: `one pass` (none to keep), `factors on device`, `factors on host`, `k block groups` (rounds)."""
        if self._rounds > 1:  # a round is called a block group in records, which stay readable
            return f"{self._rounds} block groups"
        if any(self._host.values()):
            return "factors on host"
        return "factors on device" if self._device else "one pass"

    def keep(self, name: str, uses: Sequence[Placed]) -> list[Placed]:
        """The uses of a parameter in one pass, in the form and on the device in which they wait."""
        self.captured += sum(tensor.nbytes for placed in uses for tensor in placed.use.tensors())
        kept = [Placed(placed.view, _in_form(placed.use, self._form)) for placed in uses]
        on_device = self._device.setdefault(name, {})
        needed = {**on_device, **_bytes(kept)}
        if self._budget.host_bytes == 0 or _total_bytes([*self._device.values(), needed]) <= self._budget.device_bytes:
            on_device.update(needed)
            return kept
        moved = [Placed(placed.view, placed.use.moved(_CPU)) for placed in kept]
        self._host.setdefault(name, {}).update(_bytes(moved))
        return moved

    def returned(self, name: str, passes: list[list[Placed]]) -> list[list[Placed]]:
        """Everything kept of a parameter, on the model's device again."""
        if not self._host.get(name):
            return passes
        return [[Placed(placed.view, placed.use.moved(self._home)) for placed in uses] for uses in passes]

    def postponed(self, names: Iterable[str], share: float) -> list[str]:
        """Parameters to drop now (last first), when `share` of all passes are done.

        What all of them take, extrapolated to the last pass, would exceed the budget. The first one is never dropped.
        """
        limit = (self._budget.device_bytes + self._budget.host_bytes) * share
        staying: _Bytes = {}
        later = []
        for position, name in enumerate(names):
            needed = {**self._device.get(name, {}), **self._host.get(name, {})}
            if position and needed and _total_bytes([staying, needed]) > limit:
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


def _bytes(uses: Iterable[Placed]) -> _Bytes:
    tensors = [tensor for placed in uses for tensor in placed.use.tensors()]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _total_bytes(parts: Iterable[_Bytes]) -> int:
    together: _Bytes = {}
    for part in parts:
        together.update(part)
    return sum(together.values())


def _in_form(use: Use, form: KeptForm) -> Use:
    if form == "factors" or not isinstance(use, OuterProduct):
        return use
    left, right = use.factors()
    _, T, d_out = left.shape
    d_in = right.shape[2]
    return Dense(use.operation, use.slices(0, d_out)) if form == "gradients" or d_out * d_in < T * (d_out + d_in) else use
