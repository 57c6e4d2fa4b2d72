"""What the Fisher benchmark runs and how it is timed: the plain pass, the Grams as a callback takes them, the peers."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from fisher_cases import Workload
from fisher_peers import PEERS, block_sums, row_gradients
from torch import Tensor

from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.linalg.accumulate import gram
from curvature_callbacks.model.blocks import Blocks, BlockStructure, group_blocks
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.problem import Problem

PLAIN, OURS, PROBE = "plain", "fisher", "fisher_with_isolation"
_MOST_REPEATS = 100


@final
@dataclass(frozen=True, slots=True)
class Task:
    """Work to be timed.

    Attributes:
        run: what is timed; called with what `ready` gives.
        ready: surrounds it untimed.
    """

    run: Callable[..., Any]
    ready: Callable[[], AbstractContextManager[tuple[Any, ...]]] = lambda: nullcontext(())

    def __call__(self) -> Any:
        with self.ready() as held:
            return self.run(*held)

    def whole(self) -> "Task":
        """The same with everything timed."""
        return Task(self)


def prepared(row: str, workload: Workload) -> Task:
    """The row's work, ready to be timed: copies and hooks made, the layout certified.

    Args:
        row: `plain`, `fisher` or the name of a peer.
        workload: the model and its rows.
    """
    if row == PLAIN:
        return Task(lambda: plain(workload))
    if row == OURS:
        return certified(workload)
    gradients, blocks, N = PEERS[row](workload), block_names(workload), workload.num_samples
    return Task(lambda: block_sums(gradients, blocks, N))


def plain(workload: Workload, microbatches: Sequence[Any] | None = None) -> None:
    """One forward and backward pass to the gradients of all parameters."""
    parameters = list(workload.model.parameters())
    for batch in [workload.batch] if microbatches is None else microbatches:
        torch.autograd.grad(workload.mean_loss(batch), parameters, allow_unused=True)


def certified(
    workload: Workload,
    *,
    microbatches: Sequence[Any] | None = None,
    block_structure: BlockStructure = "layer",
    memory_budget: int | None = None,
) -> Task:
    """The Grams as a callback takes them from its second probe on, the layout known and the model isolated beforehand."""
    memory = ProbeMemory()
    batches = [workload.batch] if microbatches is None else list(microbatches)

    @contextmanager
    def ready() -> Iterator[tuple[Problem]]:
        with isolated(workload.model, seed=0):
            yield (Problem(workload.model, batches, loss=workload.loss, block_structure=block_structure, memory=memory),)

    def run(problem: Problem) -> BlockGrams:
        return problem.grams(memory_budget=memory_budget)

    task = Task(run, ready)
    task()
    return task


def block_names(workload: Workload, structure: BlockStructure = "layer") -> Blocks:
    return group_blocks(workload.model, [name for name, _ in workload.model.named_parameters()], structure)


def oracle(workload: Workload, num_rows: int) -> dict[str, Tensor]:
    """Block to the Gram of the first rows, from one float64 gradient each."""
    exact = workload.to(torch.float64, torch.arange(num_rows))
    named = dict(exact.model.named_parameters())
    rows = [row_gradients(exact, row, named) for row in torch.arange(num_rows)]
    found = {name: torch.stack([row[i] for row in rows]).reshape(num_rows, -1) for i, name in enumerate(named)}
    return {block: torch.stack([gram(found[name]) for name in names]).sum(0) for block, names in block_names(workload).items()}


def worst_error(grams: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> tuple[str, float]:
    """The block with the largest relative Frobenius error, and that error."""
    num_rows = len(next(iter(exact.values())))
    errors = {block: ((grams[block][:num_rows, :num_rows] - K).norm() / K.norm()).item() for block, K in exact.items()}
    return max(errors.items(), key=lambda item: item[1])


def whole_error(grams: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Relative Frobenius error of the Gram over all parameters, the sum of the blocks'."""
    num_rows = len(next(iter(exact.values())))
    found = torch.stack([grams[block][:num_rows, :num_rows] for block in exact]).sum(0)
    expected = torch.stack(list(exact.values())).sum(0)
    return float((found - expected).norm() / expected.norm())


def interleaved(
    work: Mapping[str, Task], repeats: int, device: torch.device, *, least_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of every task, taken in turns; the first round warms up.

    Args:
        work: the tasks.
        repeats: rounds at least.
        device: where they run.
        least_seconds: more rounds, up to 100, until this time has passed: short tasks need them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    start, rounds = time.perf_counter(), 0
    while rounds <= repeats or (time.perf_counter() - start < least_seconds and rounds < _MOST_REPEATS):
        gc.collect()  # between rounds: before every task it would leave the caches cold for it
        for name, task in work.items():
            found = timed(task, device)
            if rounds:
                seconds[name].append(found)
        rounds += 1
    return seconds


def ratios(seconds: Mapping[str, list[float]], unit: str = PLAIN) -> dict[str, float]:
    """Medians in medians of `unit`."""
    reference = statistics.median(seconds[unit])
    return {name: statistics.median(values) / reference for name, values in seconds.items() if name != unit}


def timed(task: Task, device: torch.device) -> float:
    """CPU time of this process on a CPU, where other processes share the cores; wall time on an accelerator."""
    with task.ready() as held, _no_collection():
        if device.type == "cpu":
            start = time.process_time()
            task.run(*held)
            return time.process_time() - start
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        task.run(*held)
        torch.cuda.synchronize(device)
        return time.perf_counter() - start


@contextmanager
def _no_collection() -> Iterator[None]:
    """As `timeit` does: a collection in the middle of one task is not its cost."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def one_line(error: Exception) -> str:
    """An error as a cell of a table."""
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"[:160]
