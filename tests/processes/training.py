"""Training on several processes, with and without a monitor: what each rank is left with."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from curvature_callbacks import CurvatureMonitor, EdgeRatio, FisherSpectrum, KFACCoverage, TopEigenpairs
from curvature_callbacks.measurements import Measurement
from curvature_callbacks.processes import gathering
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.record import Record
from tests.training_cases import Rows, global_generators, seed_everything

STEPS = 6
MEASURE = (
    FisherSpectrum(),
    TopEigenpairs(k=2, max_matvecs=12),
    TopEigenpairs(operator="ggn", k=2, which="LA", max_matvecs=12),
    TopEigenpairs(operator="kfac", k=2, which="LA"),
    EdgeRatio(),
    KFACCoverage(),
)


class Net(nn.Module):
    """Layers with normalisation, with buffers and without, and dropout, which draws."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm: nn.Module = nn.BatchNorm1d(8)
        self.second: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x))))


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp2(model: Net, **options: Any) -> nn.Module:
    for part in (model.second, model.head):
        fully_shard(part, **options)
    return fully_shard(model, **options)


def hsdp(model: Net) -> nn.Module:
    """Shards in pairs, each pair a replica."""
    return fsdp2(model, mesh=init_device_mesh("cpu", (2, current_world().size // 2), mesh_dim_names=("replicate", "shard")))


def fsdp2_in_bf16(model: Net) -> nn.Module:
    model.norm = nn.LayerNorm(8)  # that of batches has no bf16 on a CPU
    return fsdp2(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def fsdp2_checkpointing(model: Net) -> nn.Module:
    model.second = checkpoint_wrapper(model.second)
    return fsdp2(model)


def nothing_fits() -> AbstractContextManager[Any]:
    """As if no process had the memory for gathered parameters."""
    return mock.patch.object(gathering, "device_budget", return_value=0)


def train_without_room(wrap: Callable[..., nn.Module], probed: bool) -> tuple[dict[str, Any], list[Record]]:
    """`train` where only shards fit."""
    with nothing_fits():
        return train(wrap, probed, tuple(one for one in MEASURE if getattr(one, "operator", "") != "kfac"))


def train(
    wrap: Callable[..., nn.Module], probed: bool, measure: tuple[Measurement, ...] = MEASURE, **options: Any
) -> tuple[dict[str, Any], list[Record]]:
    """Train from a fixed seed; what is left, and the records."""
    seed_everything()
    world = current_world()
    model = Net()
    wrapped = wrap(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    torch.manual_seed(10 + world.rank)  # dropout differs by rank
    data = Rows()
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(world.rank))
    monitor = CurvatureMonitor(
        model,
        probes=DataLoader(data, batch_size=4),
        measure=list(measure),
        when=2,
        loss="cross_entropy",
        num_microbatches=2,
        microbatch_size=3,
        optimizer=optimizer,
    )
    losses, rows = [], iter(loader)
    for step in range(STEPS):
        if probed:
            monitor.step(step)
        x, y = next(rows)
        loss = F.cross_entropy(wrapped(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    left = {
        "parameters": {name: local(value) for name, value in model.state_dict().items()},
        "optimizer": [{key: local(value) for key, value in state.items()} for state in optimizer.state.values()],
        "gradients": [None if value.grad is None else local(value.grad) for value in model.parameters()],
        "losses": torch.stack(losses),
        "generators": global_generators(),
        "training": [module.training for module in model.modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
    }
    return left, monitor.history


def local(value: Any) -> Any:
    """The shard itself, where it is one."""
    found = value.to_local() if hasattr(value, "to_local") else value
    return found.detach().clone() if isinstance(found, Tensor) else found
