"""On use: parameters that FSDP2 has sharded, put together where a module uses them and let go behind it.

Inside a probe FSDP2's own hooks do not run: its gathering is in training precision, and its backward pass leaves nothing that
can be differentiated again. Here a parameter is a differentiable function of the shard held on this process, `whole =
gather(shard)`, whose derivative is "sum over processes, then the own part". That is linear, so gradients and products with
second derivatives come out as shards, and as sums over the rows of all processes. What a backward pass needs of `whole` is not
saved: it is gathered again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.device import device_budget
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.library_internals.fsdp import is_fully_sharded, sharded_parameters
from curvature_callbacks.library_internals.modules import parameters_of
from curvature_callbacks.library_internals.tensors import WeakStorage, without_torch_function
from curvature_callbacks.processes.fsdp import is_split_evenly
from curvature_callbacks.processes.world import World

_MOST_NOTED: Final = 1 << 10  # storages noted before those that are gone are dropped
_VECTORS: Final = 4  # of parameters, in float32: their values, a vector, its product, and one to work with

G = TypeVar("G")


class Watch(Protocol):
    """Who wants to know the tensors that a forward pass sees."""

    def adopt(self, name: str, whole: Tensor) -> None:
        """The parameter `name` is `whole` from now on."""
        ...

    def forget(self, whole: Tensor) -> None:
        """The module that needed it has run."""
        ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """A sharded parameter.

    Attributes:
        name: in the model.
        places: modules and the attributes they know it by.
        shape: of the whole.
        world: the processes that hold its parts, along the first axis.
    """

    name: str
    places: tuple[tuple[nn.Module, str], ...]
    shape: torch.Size
    world: World

    def gathered(self, shard: Tensor) -> Tensor:
        """The whole of it, (shape)."""
        return self.world.concatenated(shard, self.shape[0], label=self.name)

    def scattered(self, whole: Tensor) -> Tensor:
        """The part held here of the sum over processes."""
        return self.world.total(whole, label=self.name)[self.world.part(self.shape[0])].clone()


@final
class OnUse:
    """The sharded parameters of a model, by the modules that FSDP2 was applied to.

    Args:
        model: inside `isolated`.
        world: the processes.

    Attributes:
        saved_bytes: of tensors that graphs built since it was last set hold, gathered ones left out.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._world = world
        self._groups: list[tuple[nn.Module, list[_Member]]] = []
        for module in model.modules():
            members = [
                _Member(names[id(parameter)], tuple(places), parameter.shape, world)
                for parameter, places in sharded_parameters(module)
                if id(parameter) in names
            ]
            if members:
                self._groups.append((module, members))
        self._gathered: dict[int, tuple[WeakStorage, _Member, Tensor]] = {}  # address of a storage to what it holds
        self.saved_bytes = 0

    @property
    def names(self) -> set[str]:
        """Parameters that are gathered on use."""
        return {member.name for _, members in self._groups for member in members}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole parameters."""
        return {member.name: member.shape for _, members in self._groups for member in members}

    @contextmanager
    def using(self, shards: Mapping[str, Tensor], watch: Watch | None = None) -> Iterator[None]:
        """A forward pass inside sees the whole parameters of these `shards`, each group while its module runs.

        Args:
            shards: by name.
            watch: told of every whole parameter that comes and goes.
        """
        with ExitStack() as stack:
            for module, members in self._groups:
                stack.enter_context(self._gathering(module, members, shards, watch))
            yield
        self._gathered = {key: found for key, found in self._gathered.items() if not found[0].is_freed()}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Graphs built inside keep shards in place of whole parameters."""
        with saved_tensors_hooks(self._packed, self._unpacked):
            yield

    def size_of(self, build: Callable[[], G]) -> tuple[G, int]:
        """What `build` builds, and the bytes it saved on the way."""
        self.saved_bytes = 0
        graph = build()
        return graph, max(self._world.gathered(self.saved_bytes))  # all must keep the same graphs

    @contextmanager
    def _gathering(
        self, module: nn.Module, members: list[_Member], shards: Mapping[str, Tensor], watch: Watch | None
    ) -> Iterator[None]:
        there: list[Tensor] = []
        before = [(place, attribute, parameters_of(place)[attribute]) for one in members for place, attribute in one.places]

        def gather(*_: Any) -> None:
            for member in members:
                with without_torch_function():  # what is put together here is not what the model computes
                    whole = self._whole(member, shards[member.name])
                there.append(whole)
                if watch is not None:
                    watch.adopt(member.name, whole)
                for place, attribute in member.places:
                    parameters_of(place)[attribute] = whole  # type: ignore[assignment]

        def let_go(*_: Any) -> None:
            for place, attribute, parameter in before:
                parameters_of(place)[attribute] = parameter
            while there:
                whole = there.pop()
                if watch is not None:
                    watch.forget(whole)

        handles = [
            module.register_forward_pre_hook(gather, prepend=True),
            module.register_forward_hook(let_go, always_call=True),
        ]
        try:
            yield
        finally:
            let_go()
            for handle in handles:
                handle.remove()

    def _whole(self, member: _Member, shard: Tensor) -> Tensor:
        whole: Tensor = _Gather.apply(shard, member) if shard.requires_grad else member.gathered(shard)  # type: ignore[no-untyped-call]
        return self._noted(whole, member, shard)

    def _noted(self, whole: Tensor, member: _Member, shard: Tensor) -> Tensor:
        storage = whole.untyped_storage()
        if len(self._gathered) >= _MOST_NOTED:
            self._gathered = {key: found for key, found in self._gathered.items() if not found[0].is_freed()}
        self._gathered[storage.data_ptr()] = WeakStorage(storage), member, shard.detach()
        return whole

    def _packed(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        found = self._gathered.get(storage.data_ptr())
        if found is None or not found[0].refers_to(storage):
            self.saved_bytes += storage.nbytes()
            return tensor
        _, member, shard = found
        return member, shard, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpacked(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        member, shard, shape, stride, offset = packed
        whole = self._noted(member.gathered(shard), member, shard)
        return whole.as_strided(shape, stride, offset)


def on_use_parameters(model: nn.Module, world: World, device: torch.device) -> OnUse | None:
    """None where every process can hold the whole parameters of `model`, and a few vectors of their size, beside training."""
    if world.size == 1 or not any(map(is_fully_sharded, model.modules())):
        return None
    named = dict(model.named_parameters())
    needed = _VECTORS * sum(4 * parameter.numel() for parameter in named.values())
    if not world.anywhere(needed > device_budget(device)):
        return None
    odd = [name for name, value in named.items() if not is_split_evenly(value, world)]
    if odd:
        raise ConfigurationError(
            f"whole parameters do not fit a process, and `{odd[0]}` is not split along its first axis over all {world.size} of "
            "them: shard over a mesh of one dimension, or measure fewer parameters."
        )
    found = OnUse(model, world)
    missing = [name for name, parameter in named.items() if parameter.requires_grad and name not in found.names]
    if missing:
        raise ConfigurationError(
            f"`{missing[0]}` is not sharded while others are, and whole parameters do not fit: apply `fully_shard` to the root "
            "too."
        )
    return found


def in_step(microbatches: Sequence[Any], world: World) -> list[Any]:
    """As many microbatches, of as many rows, on every process: every pass gathers parameters, and all must take part."""
    sizes = world.gathered([batch_size(batch) for batch in microbatches])
    common = [min(found) for found in zip(*sizes, strict=False)]
    return [take_rows(batch, torch.arange(size)) for batch, size in zip(microbatches, common, strict=False)]


class _Gather(torch.autograd.Function):
    """Shard to whole."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, member: _Member) -> Tensor:
        ctx.member = member
        return member.gathered(shard)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(gradient, ctx.member), None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """Summed over processes, then the own part."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, member: _Member) -> Tensor:
        ctx.member = member
        return member.scattered(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient, ctx.member), None  # type: ignore[no-untyped-call]
