"""The host waits for the device at looks only, never within a step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.limits import LanczosLimits
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.reorthogonalisation import Full, Off, Partial, Reorthogonalisation, Selective
from curvature_callbacks.linalg.lanczos.solver import solve
from tests.linalg.lanczos.lanczos_cases import Counted, outliers_and_bulk, reflected, symmetric

READS = {"cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "is_nonzero"}


class Reads(TorchFunctionMode):
    """Counts the calls that would make the host wait for an accelerator, here where all tensors are on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        to_host = name == "to" and any(str(value) == "cpu" for value in (*args[1:], *(kwargs or {}).values()))
        self.count += name in READS or to_host
        return function(*args, **(kwargs or {}))


class ScalarReads(TorchDispatchMode):
    """Counts the scalars read, however they were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def watched() -> Counted:
    """Without free reads: on a CPU a step may look whether a second pass is needed, and the run at every step."""
    return Counted(symmetric(outliers_and_bulk(80)), reads_are_free=False)


POLICIES: dict[str, Callable[[], Reorthogonalisation]] = {
    "full": Full,
    "off": Off,
    "partial": lambda: Partial(eps=1e-16, ahead=5),
    "selective": lambda: Selective(eps=1e-16, window=3, period=5),
}


@pytest.mark.parametrize("mode", POLICIES)
def test_a_step_reads_nothing(mode: str):
    krylov = Krylov(watched(), 40, seed=0, policy=POLICIES[mode]())
    with Reads() as reads, ScalarReads() as scalars:
        for _ in range(20):
            krylov.step()
    assert krylov.num_matvecs == 20
    assert reads.count == scalars.count == 0


def test_a_step_after_a_restart_reads_nothing():
    krylov = Krylov(watched(), 20, seed=0)
    for _ in range(20):
        krylov.step()
    krylov.settle()
    krylov.restart(torch.linalg.eigh(krylov.projection.matrix()).eigenvectors[:, -8:], locked=0)
    with Reads() as reads, ScalarReads() as scalars:
        for _ in range(5):
            krylov.step()
    assert reads.count == scalars.count == 0


def test_a_look_is_seen_by_the_counters():
    """Else zero above would mean nothing."""
    krylov = Krylov(watched(), 40, seed=0)
    krylov.step()
    with Reads() as reads, ScalarReads() as scalars:
        krylov.settle()
    assert reads.count > 0
    assert scalars.count > 0
    with Reads() as reads:
        torch.ones(1).to("cpu")
    assert reads.count == 1


@pytest.mark.parametrize("mode", ["full", "thick_restart"])
def test_reads_depend_on_the_looks_and_not_on_the_steps(mode: str):
    counts = set()
    for every in (5, 10, 20):
        operator = Counted(reflected(torch.linspace(-1, 1, 500)), reads_are_free=False)
        options = LanczosOptions(
            k=4,
            tol=1e-30,
            max_matvecs=4 * every,
            reorth_mode=mode,  # type: ignore[arg-type]
            max_seconds=1e6,
            basis_size=120 if mode == "thick_restart" else None,
        )
        with Reads() as reads, ScalarReads() as scalars:
            pairs = solve(operator, options, limits=LanczosLimits(look_every=every))
        assert pairs.num_matvecs == 4 * every
        counts.add((reads.count, scalars.count))
    assert len(counts) == 1
    assert next(iter(counts))[0] <= 4 * 30
