"""A loop without framework: `CurvatureMonitor.step` between optimizer steps leaves it bit-identical."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from curvature_callbacks import CapturedProbes, CurvatureMonitor
from tests.training_cases import (
    AugmentedRows,
    Checksum,
    Raising,
    Run,
    Stream,
    assert_probed,
    assert_same_training,
    cheap,
    global_generators,
    loader,
    seed_everything,
)

Watch = Callable[[nn.Module, DataLoader[Any]], CurvatureMonitor]


class Residual(nn.Module):
    """Two uses of one weight, an activation that works in place, dropout, a BatchNorm and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.dropout, self.last = nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        tokens = self.first(x)[:, None, None, :].expand(-1, -1, 2, -1)
        x = x + F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0, 0]
        return self.last(self.dropout(x))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


def plain_run(watch: Watch | None, *, optimizer: str = "adamw", num_epochs: int = 2, **changes: Any) -> Run:
    """Train two epochs; gradients of the last step are kept alive across the probe on purpose."""
    seed_everything()
    model = Residual()
    model.dropout.eval()  # the user's choice, to be kept
    train = loader(**({"dataset": AugmentedRows()} | changes))
    stepper = OPTIMIZERS[optimizer](model.parameters())
    monitor = watch(model, train) if watch else None
    logged, step = [], 0
    for _ in range(num_epochs):
        for x, y in train:
            if monitor:
                monitor.step(step)
            loss = F.cross_entropy(model(x), y)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            logged.append((loss.item(), np.random.rand(), [parameter.grad.sum().item() for parameter in model.parameters()]))
            step += 1
    if monitor:
        monitor.step(step)
    state = dict(model.state_dict()) | {"training": [module.training for module in model.modules()]}
    gradients = {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    records = monitor.history if monitor else []
    return Run(state | gradients, [stepper.state_dict()], logged, global_generators(), records)


def watching(**changes: Any) -> Watch:
    usual = {"measure": cheap(), "when": 4, "loss": "cross_entropy", "num_microbatches": 2, "microbatch_size": 3}
    return lambda model, train: CurvatureMonitor(model, probes=train, **(usual | changes))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("structure", ["layer", "parameter", "none"])
def test_training_is_bit_identical(optimizer: str, structure: str) -> None:
    plain, probed = plain_run(None, optimizer=optimizer), plain_run(watching(block_structure=structure), optimizer=optimizer)
    assert_probed(probed.records, [0, 4, 8, 12])
    assert_same_training(plain, probed)


def test_persistent_workers_deliver_the_same_data() -> None:
    workers = {"num_workers": 1, "persistent_workers": True}
    plain, probed = plain_run(None, **workers), plain_run(watching(), **workers)
    assert_probed(probed.records, [0, 4, 8, 12])
    assert_same_training(plain, probed)


def test_a_stream_is_watched_going_by() -> None:
    captured = CapturedProbes(num_microbatches=2, microbatch_size=3)

    class Offering(DataLoader[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                captured.offer(batch)
                yield batch

    def watch(model: nn.Module, train: DataLoader[Any]) -> CurvatureMonitor:
        train.__class__ = Offering
        return watching()(model, captured)  # type: ignore[arg-type]

    plain, probed = (plain_run(chosen, dataset=Stream(AugmentedRows()), shuffle=False) for chosen in (None, watch))
    assert_probed(probed.records, [0, 4, 8, 12])
    assert_same_training(plain, probed)


@pytest.mark.parametrize("error", [RuntimeError("x"), torch.OutOfMemoryError("CUDA out of memory")])
def test_failures_change_nothing(error: Exception) -> None:
    plain = plain_run(None)
    probed = plain_run(watching(measure=[Raising(error=error, at=(0, 8)), Checksum()]))
    assert_same_training(plain, probed)
    assert [record.step for record in probed.records if record.failed] == [0, 8]


def test_all_options_together() -> None:
    plain = plain_run(None)
    options = {"params_filter": lambda name, parameter: "norm" not in name, "draw": "fixed", "seed": 5}
    probed = plain_run(watching(**options))
    assert_probed(probed.records, [0, 4, 8, 12])
    assert_same_training(plain, probed)
    assert all("norm" not in (record.block or "") for record in probed.records)
