"""A device: the memory a probe may take beyond what training holds, and waiting for it."""

import os
from typing import Final

import torch

_CPU_BYTES: Final = 2 << 30
_FREE_SHARE: Final = 0.5  # of the memory that is free when it is asked


def device_budget(device: torch.device) -> int:
    """Bytes: 2 GiB on a CPU, half of its free memory on a CUDA device, 2 GiB on accelerators that do not tell."""
    return int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else _CPU_BYTES


def host_budget() -> int:
    """Bytes: half of the free memory of the host."""
    return int(_FREE_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def synchronise(device: torch.device) -> None:
    """Wait until everything asked of a CUDA device is done: for clocks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
