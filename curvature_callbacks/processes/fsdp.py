"""How a model lies over processes, a replica on each (DDP) or in shards (FSDP2), and which models cannot be measured."""

from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.library_internals.fsdp import sharded_parameters
from curvature_callbacks.library_internals.modules import buffers_of
from curvature_callbacks.processes.world import World
from curvature_callbacks.space import Space


def check_model_over_processes(model: nn.Module, world: World) -> None:
    """Raise a `ConfigurationError` for a model that cannot be measured over these processes.

    Supported are one process, replicas (DDP) and FSDP2 (`fully_shard`), whose parameters are gathered inside a probe.

    Cost: with replicas one pass over the parameters.
    """
    obstacle = _obstacle(model)
    if obstacle is not None:
        raise ConfigurationError(
            f"{obstacle}: that is not supported. Supported are one process, DDP and FSDP2 (`fully_shard` over one mesh "
            "dimension or two); or measure offline on a checkpoint."
        )
    if world.size == 1:
        return
    with world.together():
        digest = [(name, tuple(value.shape), value.requires_grad, _checksum(value)) for name, value in model.named_parameters()]
    first, *others = world.gathered(digest)
    for rank, other in enumerate(others, start=1):
        if other != first:
            names = [expected[0] for given, expected in zip(other, first, strict=False) if given != expected]
            raise ConfigurationError(
                f"processes 0 and {rank} train different models (parameter `{(names or ['?'])[0]}` differs): curvature is "
                "reduced over replicas of one model. Measure in a process group of one, or before `init_process_group`."
            )


def take_buffers(model: nn.Module, world: World) -> None:
    """Put rank zero's buffers (running statistics) into `model`, as DDP does at its next pass and checkpoints have them.

    Call it inside `isolated`, which puts this process's buffers back. Cost: one broadcast of them.
    """
    buffers = {name: buffer for name, buffer in model.named_buffers() if _can_be_sent(buffer)}
    sizes = world.gathered({name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()})
    # Those that are alike everywhere: a cache may be as long as the longest sequence its process has seen.
    common = [name for name, size in sizes[0].items() if all(other.get(name) == size for other in sizes)]
    contents = world.broadcast([buffers[name] for name in common], source=0)
    if world.rank == 0:
        return
    with torch.no_grad():
        for name, content in zip(common, contents, strict=True):
            _fill(model, buffers[name], content)


def _can_be_sent(buffer: Tensor) -> bool:
    """Whether it is numbers in memory: no shard, and neither sparse, quantized nor without values."""
    return not hasattr(buffer, "full_tensor") and buffer.layout is torch.strided and not (buffer.is_quantized or buffer.is_meta)


def _fill(model: nn.Module, buffer: Tensor, content: Tensor) -> None:
    """Copy `content` to `buffer`, or give it to the modules that hold a buffer which cannot be written to."""
    if not buffer.is_inference() and 0 not in buffer.stride():  # neither made in inference mode nor expanded
        buffer.copy_(content)
        return
    for module in model.modules():
        buffers = buffers_of(module)
        for name in [name for name, value in buffers.items() if value is buffer]:
            buffers[name] = content


def _obstacle(model: nn.Module) -> str | None:
    sharded = {id(parameter) for module in model.modules() for parameter, _ in sharded_parameters(module)}
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            return f"`{path or type(module).__name__}` is wrapped by FSDP1"
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "FlatParameter":
            return f"parameter `{name}` is flattened by FSDP1"
        if hasattr(parameter, "ds_id"):
            return f"parameter `{name}` is partitioned by DeepSpeed ZeRO-3"
        if hasattr(parameter, "full_tensor") and id(parameter) not in sharded:
            return f"parameter `{name}` is a DTensor outside FSDP2 (tensor parallelism)"
    return None


def passes_are_collective(model: nn.Module) -> bool:
    """Whether all processes must make the same passes of the model of an `Objective`, none of their own.

    Parameters that are still shards there are gathered by all at every pass (`OnUse`).
    """
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _checksum(value: Tensor) -> str:
    """The sum of the bits as integers, the same on all replicas; "" for a shard, which differs from the others."""
    if hasattr(value, "full_tensor"):
        return ""
    return str(int(value.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)))


def is_split_evenly(value: Any, world: World) -> bool:
    """Whether a sharded tensor lies in parts of its first axis on all processes; True for one that is not sharded."""
    placements = getattr(value, "placements", None)
    if placements is None:
        return True
    return len(placements) == 1 and placements[0].is_shard(0) and value.device_mesh.size() == world.size


def unsharded(value: Any, world: World) -> Any:
    """The tensor of which `value` is a shard (FSDP2), which every process must then ask for; else `value` itself, detached.

    A tensor of which processes hold uneven parts is gathered by itself (`full_tensor`): the only collective outside of
    `group.py`, made in `together` so that a process that has no room for it leaves nobody waiting.
    """
    if not isinstance(value, Tensor) or not hasattr(value, "full_tensor"):
        return value.detach() if isinstance(value, Tensor) else value
    if is_split_evenly(value, world):
        return world.concatenated(shard(value), value.shape[0], label=str(value.shape))
    with world.together():  # is there room for it everywhere? all take part in what follows
        torch.empty(value.shape, dtype=value.dtype, device=value.device)
    gathered: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
    return gathered


def shard(value: Any) -> Any:
    """`value` itself, detached, or what this process holds of it where it is sharded (FSDP2)."""
    if not isinstance(value, Tensor):
        return value
    local = getattr(value.detach(), "to_local", None)
    return value.detach() if local is None else local()


@final
class ShardSpace(Space):
    """Vectors of which every process holds its shards, and no process more: the part of a vector is the vector handed on."""

    def __init__(self, world: World) -> None:
        self._world = world

    @override
    def total(self, partial: Tensor) -> Tensor:
        return self._world.total(partial)

    @override
    def seed(self, seed: int) -> int:
        return self._world.seed(seed)

    @override
    def part(self, length: int) -> slice:
        return slice(0, length)

    @override
    def assembled(self, part: Tensor, length: int) -> Tensor:
        return part
