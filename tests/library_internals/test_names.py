"""A new release of a library that drops a name the package uses fails here, by that name and with what stops working."""

from pathlib import Path
from typing import Any

import pytest

from curvature_callbacks.library_internals.fsdp import is_sharding_hook
from curvature_callbacks.library_internals.modules import forward_hooks_of
from tests.library_internals.names import INTERNALS, Internal, sharded_module


class Lacking:
    """An object without one of its attributes."""

    def __init__(self, holder: Any, name: str) -> None:
        self._holder, self._name = holder, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._holder, name)


pytestmark = pytest.mark.filterwarnings("ignore")
named = pytest.mark.parametrize("internal", INTERNALS, ids=[internal.name for internal in INTERNALS])


@pytest.fixture(autouse=True)
def _holders_write_to_a_directory_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@named
def test_it_is_there(internal: Internal) -> None:
    complaint = internal.complaint(internal.holder())
    assert complaint is None, complaint


@named
def test_its_absence_is_told_by_its_name(internal: Internal) -> None:
    complaint = internal.complaint(Lacking(internal.holder(), internal.name))
    assert complaint == f"`{internal.name}` is gone: {internal.without}."


def test_hooks_of_fsdp_are_told_by_where_they_are_written() -> None:
    """For want of a name: `is_sharding_hook` goes by their module."""
    hooks = [hook for registry in forward_hooks_of(sharded_module()) for hook in registry.values()]
    assert hooks
    assert all(is_sharding_hook(hook) for hook in hooks), "hooks of FSDP2 are gone from torch.distributed.fsdp"
    assert not is_sharding_hook(print)
