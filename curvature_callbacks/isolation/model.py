"""Isolation of a model: whatever a probe does, the training run finds everything as it left it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.isolation.generators import begun_at, global_generators
from curvature_callbacks.isolation.precision import full_precision
from curvature_callbacks.isolation.replicas import attributes_set_aside
from curvature_callbacks.isolation.snapshot import put_back
from curvature_callbacks.library_internals.frameworks import (
    experts_implementation,
    original_forward,
    set_experts_implementation,
)
from curvature_callbacks.library_internals.fsdp import is_fully_sharded, is_sharding_hook, reshard
from curvature_callbacks.library_internals.modules import buffers_of, forward_hooks_of, plain_checkpoints

_DETERMINISTIC_CUBLAS: Final = (":4096:8", ":16:8")  # the two settings PyTorch accepts


@contextmanager
def isolated(model: nn.Module, *, seed: int) -> Iterator[frozenset[nn.Module]]:
    """Evaluation mode, full float32, math attention, eager stance and seeded generators; everything restored on the way out.

    Saved and restored, also after an exception: generators (torch CPU, the model's accelerator, NumPy, Python), attributes
    and parts of every submodule (a forward pass works on replicas of what they keep), the `training` flag of each, identity
    and content of every buffer, matmul precision, SDPA backend, compile stance, autocast, grad mode, activation
    checkpointing, the implementation of experts, the `forward` that accelerate patches for mixed precision (the original one
    runs inside), and FSDP2's hooks (none run inside). Not touched at all: parameters, `.grad`, other hooks, optimizers, data
    loaders.

    Args:
        model: the module training runs, unwrapped (no DDP, no `torch.compile` wrapper).
        seed: seeds the global generators inside, so that augmentations of a probe are the same in every process.

    Yields:
        The modules that are in training mode outside.

    Cost: one copy of the buffers and of the small attributes.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modules = list(model.modules())
    in_training = frozenset(module for module in modules if module.training)
    with ExitStack() as stack:
        stack.enter_context(_generators(device, seed))
        stack.enter_context(attributes_set_aside(modules))
        stack.enter_context(_training_flags(modules))
        stack.enter_context(_buffers(modules))
        stack.enter_context(_unpatched_forward(modules))
        stack.enter_context(_no_sharding_hooks(modules))
        stack.enter_context(full_precision())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels have no second derivative
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled graph cannot be differentiated twice
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(plain_checkpoints())
        stack.enter_context(_eager_experts(modules))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield in_training


@contextmanager
def deterministic_algorithms(device: torch.device, *, enabled: bool = True) -> Iterator[None]:
    """PyTorch's deterministic algorithms inside, and no choice of cuDNN's by timing; both as before on the way out.

    Raises:
        ConfigurationError: the device is CUDA and cuBLAS has not been told to be deterministic when the process started.
        RuntimeError: an operation inside has no deterministic algorithm.
    """
    if not enabled:
        yield
        return
    if device.type == "cuda" and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _DETERMINISTIC_CUBLAS:
        raise ConfigurationError(
            "`deterministic`=True on CUDA needs the environment variable CUBLAS_WORKSPACE_CONFIG set to one of "
            f"{', '.join(_DETERMINISTIC_CUBLAS)} before the process starts."
        )
    is_enabled, warns_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(is_enabled, warn_only=warns_only)


@contextmanager
def seeded(model: nn.Module, *, seed: int) -> Iterator[None]:
    """The global generators begin at `seed`, and go on afterwards where they were."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with _generators(device, seed):
        yield


def _generators(device: torch.device, seed: int) -> AbstractContextManager[None]:
    return begun_at(global_generators(device), seed)


@contextmanager
def _training_flags(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode by flag, module by module: `model.train()` afterwards would unfreeze what the user froze."""
    flags = [(module, module.training) for module in modules]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    registries = [buffers_of(module) for module in modules]
    saved = [(dict(buffers), _copies(buffers)) for buffers in registries]
    with put_back(registries):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffers, contents in saved:
                    _restore_contents(buffers, contents)


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in buffers.items() if buffer is not None}


def _restore_contents(buffers: Mapping[str, Tensor | None], contents: Mapping[str, Tensor]) -> None:
    for name, content in contents.items():
        buffer = buffers[name]
        if buffer is not None and not _same(buffer, content):
            buffer.copy_(content)


def _same(buffer: Tensor, content: Tensor) -> bool:
    if buffer.layout is not torch.strided or buffer.is_meta:  # which `equal` does not know; there is nothing in the latter
        return buffer.is_meta
    if buffer.shape != content.shape or torch.equal(buffer, content):
        return buffer.shape == content.shape
    return bool(((buffer == content) | (buffer.isnan() & content.isnan())).all())


@contextmanager
def _unpatched_forward(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without the autocast that accelerate writes over `forward`, on any module that carries its mark."""
    patched = [(vars(module), original) for module in modules if (original := original_forward(module)) is not None]
    saved = [attributes["forward"] for attributes, _ in patched]
    try:
        for attributes, original in patched:
            attributes["forward"] = original
        yield
    finally:
        for (attributes, _), forward in zip(patched, saved, strict=True):
            attributes["forward"] = forward


@contextmanager
def _no_sharding_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """FSDP2 without its gathering: a probe passes gathered parameters of its own, in full precision, and shards stay shards."""
    reshard(modules)
    hooked: list[Any] = [hooks for module in modules if is_fully_sharded(module) for hooks in forward_hooks_of(module)]
    with put_back(hooked):
        for hooks in hooked:
            for key in [key for key, hook in hooks.items() if is_sharding_hook(hook)]:
                del hooks[key]
        yield


@contextmanager
def _eager_experts(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Hugging Face's mixtures of experts one expert at a time: grouped products keep no sample apart and know no float64."""
    configs: dict[int, Any] = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    saved = [(config, name) for config in configs.values() if (name := experts_implementation(config)) not in (None, "eager")]
    try:
        for config, _ in saved:
            set_experts_implementation(config, "eager")
        yield
    finally:
        for config, name in saved:
            set_experts_implementation(config, name)
