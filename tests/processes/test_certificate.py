"""The objective of two processes is proved, or refused, on both alike."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError
from curvature_callbacks.processes.group import current_world
from tests.problem.certificate_cases import contrastive, halved, monitor, plain
from tests.processes import training
from tests.processes.ranks import Ranks


def own_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3 + current_world().rank)
    return [(torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(2)]


def proved(wrap: str, fits: bool, loss: Any, loop: Any) -> Any:
    """What the first record says of the objective, or the message of the refusal."""
    torch.manual_seed(0)
    model: nn.Module = getattr(training, wrap)(training.Net())
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    with nullcontext() if fits else training.nothing_fits():
        watching = monitor(loss, loop, model=bare, batches=own_batches())
        try:
            records = watching.step(0)
        except ConfigurationError as error:
            return str(error)
    assert not any(record.failed for record in records)
    return records[0].metadata["objective"]


@pytest.mark.parametrize(("wrap", "fits"), [("ddp", True), ("fsdp2", True), ("fsdp2", False)])
def test_both_processes_find_the_same(wrap: str, fits: bool, two_processes: Ranks) -> None:
    first, second = two_processes(proved, wrap, fits, "cross_entropy", plain)
    assert first == second
    assert max(first["by the training loop"].values()) <= 1e-6
    assert first["by live parameters"] == ("parameters are sharded" if wrap == "fsdp2" else {"value": 0.0, "gradient": 0.0})
    assert first["coupled"] is None
    for refusal in two_processes(proved, wrap, fits, "cross_entropy", halved):
        assert "the gradient of the first is 2 times that of the other" in refusal
    first, second = two_processes(proved, wrap, fits, contrastive, None)
    assert first == second
    assert "rows that change places" in first["coupled"]


def raising_on_one(model: nn.Module, batch: Any) -> Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    if current_world().rank == 1:
        raise KeyError("only in training")
    return loss


@pytest.mark.parametrize("fits", [True, False])
def test_a_loop_that_cannot_be_called_on_one_process_is_compared_on_none(fits: bool, two_processes: Ranks) -> None:
    first, second = two_processes(proved, "fsdp2", fits, "cross_entropy", raising_on_one)
    assert first == second
    assert "only in training" in first["by the training loop"]
