"""Parameters that FSDP2 has sharded, gathered where a module uses them and let go behind it.

Inside a probe FSDP2's own hooks do not run: its gathering is in training precision, and its backward pass leaves nothing that
can be differentiated again. Here a parameter is a differentiable function of the shard held on this process,
`parameter = gather(shard)`, whose derivative is "sum over processes, then the own part". That is linear, so gradients and
products with second derivatives come out as shards, and as sums over the samples of all processes.

One forward pass of a module that FSDP2 shards:

    before it runs      gather: its parameters are put together and stand in the module in place of the shards
    while it runs       the graph saves what its derivative needs; of a gathered parameter it saves how to gather it again
    when it has run     give back: the shards stand in the module again, and the gathered parameters are freed
    backward pass       what was saved is gathered again, for as long as one node needs it
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, final

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from curvature_callbacks.device import device_budget
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.library_internals.fsdp import is_fully_sharded, sharded_parameters
from curvature_callbacks.library_internals.modules import parameters_of
from curvature_callbacks.library_internals.tensors import WeakStorage, without_torch_function
from curvature_callbacks.processes.fsdp import is_split_evenly
from curvature_callbacks.processes.world import World

_MOST_NOTED: Final = 1 << 10  # storages noted before those that are freed are dropped
_VECTORS: Final = 4  # of parameters, in float32: their values, a vector, its product, and one to work with

Built = TypeVar("Built")
LinearMap = Callable[[Tensor], Tensor]


class SizedBuild(Protocol):
    """A function that builds a graph and returns it with its size in bytes."""

    def __call__(self, build: Callable[[], Built], /) -> tuple[Built, int]:
        """The graph that `build` builds, and the bytes of the tensors it saved."""
        ...


class Watch(Protocol):
    """Observer of gathered parameters during a forward pass."""

    def adopt(self, name: str, gathered: Tensor, /) -> None:
        """From now on the model uses `gathered` as the parameter `name`."""
        ...

    def forget(self, gathered: Tensor, /) -> None:
        """The module that needed it has run."""
        ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """A sharded parameter.

    Attributes:
        name: in the model.
        owners: modules and the attributes they know it by.
        shape: of the parameter, gathered.
        world: the processes that hold its shards, along the first axis.
    """

    name: str
    owners: tuple[tuple[nn.Module, str], ...]
    shape: torch.Size
    world: World

    def gathered_parameter(self, shard: Tensor) -> Tensor:
        """(shape) from the shards of all processes."""
        return self.world.concatenated(shard, self.shape[0], label=self.name)

    def differentiable(self, shard: Tensor) -> Tensor:
        """`gathered_parameter` as a function of the shard, whose derivative is `scattered`."""
        result: Tensor = _LinearMap.apply(shard, self.gathered_parameter, self.scattered)  # type: ignore[no-untyped-call]
        return result

    def scattered(self, gradient: Tensor) -> Tensor:
        """The part held here of the sum over processes of a `gradient` (shape)."""
        return self.world.total(gradient, label=self.name)[self.world.part(self.shape[0])].clone()


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
                _Member(names[id(parameter)], tuple(owners), parameter.shape, world)
                for parameter, owners in sharded_parameters(module)
                if id(parameter) in names
            ]
            if members:
                self._groups.append((module, members))
        self.storages = _GatheredStorages()
        self.saved_bytes = 0

    @property
    def names(self) -> set[str]:
        """Parameters that are gathered on use."""
        return {member.name for _, members in self._groups for member in members}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name to the shape of the gathered parameter."""
        return {member.name: member.shape for _, members in self._groups for member in members}

    @contextmanager
    def using(self, shards: Mapping[str, Tensor], watch: Watch | None = None) -> Iterator[None]:
        """A forward pass inside sees the gathered parameters of these `shards`, each group while its module runs.

        Args:
            shards: by name.
            watch: is shown every gathered parameter that comes and goes.
        """
        with ExitStack() as stack:
            for module, members in self._groups:
                turn = _Turn(members, lambda member: self._gathered(member, shards[member.name]), watch)
                stack.enter_context(turn.around(module))
            yield
        self.storages.drop_freed()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Graphs built inside keep shards in place of gathered parameters."""
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def size_of(self, build: Callable[[], Built]) -> tuple[Built, int]:
        """What `build` builds, and the bytes it saved on the way: the most over processes, which must keep the same graphs."""
        self.saved_bytes = 0
        graph = build()
        return graph, max(self._world.gathered(self.saved_bytes))

    def _gathered(self, member: _Member, shard: Tensor) -> Tensor:
        with without_torch_function():  # what is put together here is not what the model computes
            result = member.differentiable(shard) if shard.requires_grad else member.gathered_parameter(shard)
            self.storages.note(result, member, shard)
            return result

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        source = self.storages.source_of(storage)
        if source is None:
            self.saved_bytes += storage.nbytes()
            return tensor
        return *source, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        member, shard, shape, stride, offset = packed
        gathered: Tensor = member.gathered_parameter(shard)
        self.storages.note(gathered, member, shard)  # a graph of this backward pass may save it again
        return gathered.as_strided(shape, stride, offset)


@final
class _Turn:
    """One module's turn in a forward pass: `gather` runs before it and `give_back` behind it."""

    def __init__(self, members: Sequence[_Member], gathered: Callable[[_Member], Tensor], watch: Watch | None) -> None:
        self._members = members
        self._gathered = gathered
        self._watch = watch
        owners = [owner for member in members for owner in member.owners]
        self._shards = [(module, attribute, parameters_of(module)[attribute]) for module, attribute in owners]
        self._held: list[Tensor] = []  # empty outside the turn: nothing gathered may outlive it here

    @contextmanager
    def around(self, module: nn.Module) -> Iterator[None]:
        """Inside, the turn is taken whenever `module` runs."""
        handles = [
            module.register_forward_pre_hook(self._gather, prepend=True),
            module.register_forward_hook(self._give_back, always_call=True),
        ]
        try:
            yield
        finally:
            self._give_back()
            for handle in handles:
                handle.remove()

    def _gather(self, *_: Any) -> None:
        for member in self._members:
            gathered = self._gathered(member)
            self._held.append(gathered)
            if self._watch is not None:
                self._watch.adopt(member.name, gathered)
            for module, attribute in member.owners:
                parameters_of(module)[attribute] = gathered  # type: ignore[assignment]

    def _give_back(self, *_: Any) -> None:
        for module, attribute, shard in self._shards:
            parameters_of(module)[attribute] = shard
        while self._held:
            gathered = self._held.pop()
            if self._watch is not None:
                self._watch.forget(gathered)


@final
class _GatheredStorages:
    """Which storages are those of gathered parameters, and from which shard each can be gathered again.

    By address, since a graph saves views of a parameter (transposed, cut), which are other objects and share its storage alone.
    An address is used again once its storage is freed; a weak reference, which keeps nothing alive, tells whether the storage
    noted there is the one asked for.
    """

    def __init__(self) -> None:
        self._sources: dict[int, tuple[WeakStorage, _Member, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def note(self, gathered: Tensor, member: _Member, shard: Tensor) -> None:
        """The storage of `gathered` is that of the parameter `member`, put together from this `shard` and those of others."""
        if len(self._sources) >= _MOST_NOTED:
            self.drop_freed()
        storage = gathered.untyped_storage()
        self._sources[storage.data_ptr()] = WeakStorage(storage), member, shard.detach()

    def source_of(self, storage: UntypedStorage) -> tuple[_Member, Tensor] | None:
        """Parameter and shard behind a storage; None for one that holds something else."""
        source = self._sources.get(storage.data_ptr())
        return None if source is None or not source[0].refers_to(storage) else source[1:]

    def drop_freed(self) -> None:
        """Forget storages that nobody holds any more."""
        self._sources = {address: source for address, source in self._sources.items() if not source[0].is_freed()}


def on_use_parameters(model: nn.Module, world: World, device: torch.device) -> OnUse | None:
    """The parameters to gather on use; None where each process has room for all of them, and a few vectors of their size.

    Raises:
        ConfigurationError: they do not fit, and are sharded in a way that cannot be gathered on use.
    """
    if world.size == 1 or not any(map(is_fully_sharded, model.modules())):
        return None
    named = dict(model.named_parameters())
    needed = _VECTORS * sum(4 * parameter.numel() for parameter in named.values())
    if not world.anywhere(needed > device_budget(device)):
        return None
    uneven = [name for name, value in named.items() if not is_split_evenly(value, world)]
    if uneven:
        raise ConfigurationError(
            f"unsharded parameters do not fit a process, and `{uneven[0]}` is not split along its first axis over all "
            f"{world.size} of them: shard over a mesh of one dimension, or measure fewer parameters."
        )
    on_use = OnUse(model, world)
    missing = [name for name, parameter in named.items() if parameter.requires_grad and name not in on_use.names]
    if missing:
        raise ConfigurationError(
            f"`{missing[0]}` is not sharded while others are, and unsharded parameters do not fit: apply `fully_shard` to the "
            "root too."
        )
    return on_use


class _LinearMap(torch.autograd.Function):
    """`forward_map(x)` of a linear map: its derivative is `adjoint_map`, whose derivative is `forward_map` again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_map: LinearMap, adjoint_map: LinearMap) -> Tensor:
        ctx.maps = forward_map, adjoint_map
        return forward_map(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        forward_map, adjoint_map = ctx.maps
        return _LinearMap.apply(gradient, adjoint_map, forward_map), None, None  # type: ignore[no-untyped-call]
