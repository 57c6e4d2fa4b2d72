"""Objective: the loss as a function of the trainable parameters, on aliases that leave the model untouched."""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, MutableSet, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from curvature_callbacks.errors import ConfigurationError, ProbeError, named
from curvature_callbacks.isolation.generators import global_generators, kept_generators
from curvature_callbacks.isolation.writes import WriteWatch
from curvature_callbacks.library_internals.tensors import has_gradient_hooks
from curvature_callbacks.microbatch import as_microbatch
from curvature_callbacks.model.batch_norm import BatchNorms
from curvature_callbacks.model.draws import Draws, Generators
from curvature_callbacks.model.loss.recording import value_only
from curvature_callbacks.model.loss.resolve import LossFunction
from curvature_callbacks.model.loss.sample_losses import SampleLosses, of_rows
from curvature_callbacks.model.precision import compute_dtype, is_narrow, widened
from curvature_callbacks.model.substitution import LossModule, substituted
from curvature_callbacks.processes.fsdp import ShardSpace, shard, unsharded
from curvature_callbacks.processes.gathering import OnUse, SizedBuild, Watch
from curvature_callbacks.processes.group import is_agreed
from curvature_callbacks.processes.world import SINGLE, World
from curvature_callbacks.space import LOCAL, Space

ParamsFilter = Callable[[str, nn.Parameter], bool]
Built = TypeVar("Built")
R = TypeVar("R")
_Function = Callable[[nn.Module, Any], R]

_logger = logging.getLogger("curvature_callbacks")


@final
class Objective:
    """`sum_i l_i` of a microbatch at given parameter values.

    Aliased leaves stand in the model in place of its parameters while the loss is computed (`substituted`): no copy, no
    `.grad`, no parameter hook, tied weights follow. Models in bfloat16 or float16 are measured in float32: their values,
    buffers and inputs are widened (a copy of four bytes per parameter and buffer element), because a second derivative has no
    digits left in bf16.

    Attributes:
        parameters: name to detached value in `dtype`, the trainable parameters in the model's order; tied ones once.
        dtype: dtype everything is differentiated in.
        device: device of the first parameter.
        is_widened: whether any parameter of the model, trainable or not, is stored in bfloat16 or float16.
        space: of vectors of parameters.
        live_parameters: name to trainable parameter, measured or not, as the model holds it.
        draws: what the loss draws at random.

    Args:
        model: inside `isolated`.
        loss: of a microbatch.
        params_filter: which trainable parameters to keep.
        on_use: of parameters that no process can hold unsharded: `parameters` has this process's shards, gradients by them are
            sums over all processes.
        world: the processes that parameters may be sharded over.
        rewritten: names of parameters that the loss changes in place (a teacher's, normalised ones), of which every call gets
            copies, so that derivatives are those at the values it sets; `watch_writes` adds to it.
        draws: what is known of them from earlier probes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        params_filter: ParamsFilter | None = None,
        on_use: OnUse | None = None,
        world: World = SINGLE,
        rewritten: MutableSet[str] | None = None,
        draws: Draws | None = None,
    ) -> None:
        self.draws = Draws() if draws is None else draws
        self._on_use = on_use
        self._rewritten = set[str]() if rewritten is None else rewritten
        self._processes = world
        self._world = SINGLE if on_use is None else world
        self.space: Space = LOCAL if on_use is None else ShardSpace(world)
        of_model = dict(model.named_parameters())
        chosen = {
            name: parameter
            for name, parameter in of_model.items()
            if parameter.requires_grad and (params_filter is None or params_filter(name, parameter))
        }
        if not chosen:
            left = " left by `params_filter`" if params_filter else ""
            raise ConfigurationError(
                f"the model has no trainable parameter{left}: nothing to measure. Set `requires_grad` where training does."
            )
        self.live_parameters = {name: parameter for name, parameter in of_model.items() if parameter.requires_grad}
        self.dtype = compute_dtype(chosen.values())
        self.device = next(iter(chosen.values())).device
        self.is_widened = any(is_narrow(parameter.dtype) for parameter in of_model.values())
        self._sharded = set() if on_use is None else on_use.names
        self.parameters = self._widened(chosen)
        self._constants = self._widened({name: value for name, value in of_model.items() if name not in chosen})
        self._constants |= {
            name: widened(self.dtype, buffer) for name, buffer in model.named_buffers() if is_narrow(buffer.dtype)
        }
        self._module = LossModule(model, loss)
        self._generators = Generators(kept=kept_generators(model, loss), shared=global_generators(self.device))
        self._norms = BatchNorms()
        self._statistics: dict[str, Tensor] = {}  # buffers that `_norms` write to, by name

    def normalised_by(self, norms: BatchNorms) -> "Objective":
        """The same loss with these modules normalising by the batch they are given; running statistics stay as they are."""
        other = copy.copy(self)
        other._norms, other._statistics = norms, norms.buffers(self._module.model)
        return other

    def leaves(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Aliases of the named parameters (default all) that require gradients."""
        wanted = self.parameters if names is None else names
        return {name: self.parameters[name].detach().requires_grad_() for name in wanted}

    def trainable_stand_ins(self) -> dict[str, Tensor]:
        """Aliases that require gradients of all trainable parameters, also of those that are not measured."""
        held = {**self._constants, **self.parameters}
        return {name: held[name].detach().requires_grad_() for name in self.live_parameters}

    @property
    def live_obstacle(self) -> str | None:
        """Why the loss cannot be computed and differentiated by the model's own parameters, or None."""
        live = self.live_parameters.values()
        if any(hasattr(parameter, "full_tensor") for parameter in live):
            return "parameters are sharded"
        if self._rewritten:
            return "the loss changes parameters in place"
        return "parameters have hooks that see their gradients" if any(map(has_gradient_hooks, live)) else None

    def of_live_parameters(self, batch: Any) -> SampleLosses:
        """The losses of `batch` by the model as it is, in its own dtype, as plain autograd has them."""
        microbatch = as_microbatch(batch) if self.is_widened else as_microbatch(batch).in_dtype(self.dtype)
        with self.draws.at(microbatch, self._generators):
            return of_rows(self._module(microbatch, self._module.loss), microbatch)

    def with_loss(self, loss: LossFunction) -> "Objective":
        """Another loss of the same parameters; what it changes in place and draws is its own."""
        other = copy.copy(self)
        other._module = LossModule(self._module.model, loss)
        other._rewritten, other.draws = set(self._rewritten), Draws()
        return other

    @property
    def modules(self) -> list[nn.Module]:
        """The model and all its submodules, with the module that computes the loss around them."""
        return list(self._module.modules())

    def constants(self) -> list[Tensor]:
        """Tensors the loss reads beside parameters and batch: frozen parameters and buffers."""
        frozen = [value for name, value in self._constants.items() if name not in self._sharded]
        return [*frozen, *self._module.buffers()]

    def __call__(self, batch: Any, values: Mapping[str, Tensor] | None = None, *, watch: Watch | None = None) -> SampleLosses:
        """Losses of `batch` with `values` in place of the parameters of the same name.

        Where gradients are off the loss may take derivatives of its own all the same. What it draws is the same in every call.

        Args:
            batch: a `Microbatch`, or what one is made of.
            values: shards, where `parameters` has shards.
            watch: observes the parameters that are gathered on the way.
        """
        loss, values, microbatch = self._module.loss, values or {}, as_microbatch(batch)
        if torch.is_grad_enabled():
            return of_rows(self._called(loss, microbatch, values, watch), microbatch)
        with value_only():
            constant = {name: value.detach() if value.requires_grad else value for name, value in values.items()}
            return of_rows(self._called(loss, microbatch, constant, watch), microbatch).detached()

    def with_leaves(self, function: _Function[R], batch: Any, *, moved: float = 0.0) -> R:
        """What a function of model and batch returns where all parameters are leaves that require gradients.

        With `moved` they are copies, away from the measured values by normal noise of that size, the same in every process.
        """
        leaves = self.leaves()
        if moved:
            generator = torch.Generator().manual_seed(0)
            for name, leaf in leaves.items():
                noise = torch.randn(leaf.shape, generator=generator).to(leaf)
                leaves[name] = (leaf.detach() + moved * noise).requires_grad_()
        with torch.enable_grad(), self.saving():
            return self._called(function, batch, leaves, None)

    def _called(self, function: _Function[R], batch: Any, values: Mapping[str, Tensor], watch: Watch | None) -> R:
        merged = {**self._constants, **self.parameters, **values}
        merged |= {name: merged[name].clone() for name in self._rewritten}
        merged |= {name: merged.get(name, buffer).clone() for name, buffer in self._statistics.items()}
        shards = {name: merged.pop(name) for name in self._sharded}
        replaced = {f"model.{name}": tensor for name, tensor in merged.items()}
        gathering = nullcontext() if self._on_use is None else self._on_use.using(shards, watch)
        microbatch = as_microbatch(batch).in_dtype(self.dtype)
        draws = self.draws if function is self._module.loss else Draws()
        in_place, norms = substituted(self._module, replaced), self._norms.in_training_mode()
        with draws.at(microbatch, self._generators), gathering, in_place, norms:
            result: R = self._module(microbatch, function)
        return result

    def watch_writes(self, batch: Any) -> WriteWatch:
        """What the loss changes in place, parameters and tensors that are not the model's alike; it is put back.

        Parameters among it are copied from now on. Where some are sharded nothing is watched: the loss is not evaluated.

        Cost: one forward pass.
        """
        watch = WriteWatch()
        if self.is_sharded:
            return watch
        held = {**self._constants, **self.parameters}
        passed = {name: value.detach() for name, value in held.items() if name not in self._rewritten}
        try:
            with torch.no_grad(), watch:
                self(batch, passed)
        except Exception as error:  # measurements will meet it, record it and report it
            if is_agreed(error):
                raise
            _logger.debug("the loss could not be watched: %s", named(error))
        finally:
            moved = {name for name, value in passed.items() if value.data_ptr() != held[name].data_ptr()}  # by `.data = `
            moved |= {name for name in passed if watch.changed(held[name])}
            watch.put_back()
            self._rewritten |= moved
        return watch

    @property
    def sizes(self) -> dict[str, int]:
        """Name to the number of elements of the unsharded parameter."""
        shapes = {} if self._on_use is None else self._on_use.shapes
        return {name: shapes.get(name, value.shape).numel() for name, value in self.parameters.items()}

    @property
    def unsharded_parameters(self) -> dict[str, Tensor]:
        """Name to value of the parameters of which `parameters` has no shard."""
        return {name: value for name, value in self.parameters.items() if name not in self._sharded}

    @property
    def is_sharded(self) -> bool:
        """Whether `parameters` has shards, gathered module by module while the loss is computed."""
        return self._on_use is not None

    def summed(self, count: int) -> int:
        """The sum of `count` over the processes whose rows gradients are summed over."""
        return int(self._world.total(torch.tensor(count)))

    def least(self, number: int) -> int:
        """The least of `number` over the processes that must take the same path."""
        return int(min(self._world.gathered(number)))

    def most(self, number: int) -> int:
        """The most of `number` over the processes that must take the same path."""
        return int(max(self._world.gathered(number)))

    def saving(self) -> AbstractContextManager[None]:
        """A context for forward passes and for backward passes that build a graph: it will hold no gathered parameter."""
        return nullcontext() if self._on_use is None else self._on_use.saving()

    @property
    def size_of(self) -> SizedBuild | None:
        """A function that builds a graph and measures its size by counting saved tensors; None where the graph can be asked."""
        return None if self._on_use is None else self._on_use.size_of

    def mean(self, microbatches: Sequence[Any], values: Mapping[str, Tensor]) -> Tensor:
        """This process's part of the objective `L = sum_i l_i / sum_i n_i` over the microbatches of all, 0-d.

        Raises:
            ProbeError: no sample has a valid target, or L is not finite.
        """
        return self.mean_of([self(batch, values) for batch in microbatches])

    def mean_of(self, losses: Sequence[SampleLosses]) -> Tensor:
        """The same of the losses of these microbatches."""
        num_targets = int(self._processes.total(torch.tensor(sum(int(loss.num_targets.sum()) for loss in losses))))
        if num_targets == 0:
            raise ProbeError("no sample of this probe has a valid target: the loss is undefined.")
        mean = torch.stack([loss.total for loss in losses]).sum() / num_targets
        if not mean.isfinite():
            raise ProbeError(f"the loss of this probe is {mean.item()}.")
        return mean

    @property
    def is_part(self) -> bool:
        """Whether other processes have rows too: then this one may have none that counts."""
        return self._processes.size > 1

    def _widened(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held = {
            name: shard(value) if name in self._sharded else unsharded(value, self._processes)
            for name, value in tensors.items()
        }
        return {name: widened(self.dtype, value) for name, value in held.items()}
