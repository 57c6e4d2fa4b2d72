"""Private names about FSDP2 (`fully_shard`): which parameters it has sharded, and the hooks by which it gathers them."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from curvature_callbacks.errors import ConfigurationError


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to it."""
    return hasattr(module, "_get_fsdp_state")


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free gathered parameters that FSDP2 holds: those of the root stay after a forward pass without gradients (validation).

    Nothing is lost: the next forward pass gathers them again.
    """
    for module in modules:
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def sharded_parameters(module: nn.Module) -> list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Parameters that FSDP2 alone has sharded and gathers for `module`, each with the modules that know it and by what name.

    Raises:
        ConfigurationError: they are offloaded to the host.
    """
    if not is_fully_sharded(module):
        return []
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    members = [member for group in groups if group is not None for member in group.fsdp_params if not member.is_dtensor]
    if any(getattr(member, "offload_to_cpu", False) for member in members):
        raise ConfigurationError(
            "parameters of FSDP2 are offloaded to the host: that is not supported, leave out `CPUOffloadPolicy`."
        )
    return [(member.sharded_param, _owners(member._module_info)) for member in members]


def _owners(info: Any) -> list[tuple[nn.Module, str]]:
    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
    return [(info.module, info.param_name), *shared]


def is_sharding_hook(hook: Any) -> bool:
    """Whether a forward hook is FSDP2's, by where it is written: for a group of modules it is no method of FSDP's state but a
    function."""
    function = getattr(hook, "__func__", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp")
