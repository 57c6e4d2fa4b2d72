"""Processes that run a function together, as the ranks of a training run would."""

import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = 120.0  # seconds until a run that hangs is ended


class Ranks:
    """W processes in one group. They stay between calls: an import of torch takes longer than most tests.

    Args:
        size: W.
        backend: `gloo`, or `nccl` with a GPU for each.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        context = mp.get_context("spawn")
        self.size = size
        port, folder = _free_port(), tempfile.mkdtemp()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, backend, port, folder, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What `work(*args)` returns on every rank. A hang or an exception on any of them fails."""
        for pipe in self._pipes:
            pipe.send((work, args))
        results, problems = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_TIMEOUT):
                self.close()
                raise AssertionError(f"rank {rank} hangs in {work.__name__}")
            succeeded, result = pipe.recv()
            (results if succeeded else problems).append(result)
        assert not problems, "\n".join(problems)
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, backend: str, port: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "ACCELERATE_USE_CPU": "1",
        }
    )
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    while True:
        work, args = pipe.recv()
        try:
            pipe.send((True, work(*args)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
