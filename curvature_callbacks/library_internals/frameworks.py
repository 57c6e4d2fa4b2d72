"""Private names by which Transformers, accelerate and Lightning mark models, configurations and data sets.

None of the three is imported: a mark is there or not.
"""

from collections.abc import Callable
from typing import Any, Final

from torch import nn

_ACTIVATIONS: Final = "transformers.activations"  # its modules are one pointwise function each, most of them composed


def original_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The `forward` over which accelerate has written one with autocast; None where it has not."""
    attributes = vars(module)
    return attributes["_original_forward"] if "forward" in attributes and "_original_forward" in attributes else None


def experts_implementation(config: Any) -> str | None:
    """How a Hugging Face configuration says that experts are run; None where it says nothing."""
    name: str | None = getattr(config, "_experts_implementation", None)
    return name


def set_experts_implementation(config: Any, name: str) -> None:
    """Run the experts of all modules of this configuration in the way of that name, such as "eager"."""
    config._experts_implementation = name


def attention_implementation(config: Any) -> str | None:
    """The name of a Hugging Face configuration's attention, such as "sdpa"; None where it says nothing."""
    name = getattr(config, "_attn_implementation", None)
    return name if isinstance(name, str) else None


def declared_layers(cls: type) -> list[str]:
    """Names of the classes that a Hugging Face model's class declares as its layers."""
    return list(getattr(cls, "_no_split_modules", None) or ())


def is_activation(module: nn.Module) -> bool:
    """Whether it is a module of Transformers' that is one pointwise function without parameters."""
    return type(module).__module__ == _ACTIVATIONS and next(module.parameters(), None) is None


def sampler_behind(dataset: Any) -> Any:
    """The sampler whose entries Lightning has made a dataset of, to shard them; else the numbers of the rows."""
    return getattr(dataset, "_sampler", range(len(dataset)))
