"""Layers: the repeated parts of a model, and what lies outside them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from curvature_callbacks.library_internals.frameworks import declared_layers
from curvature_callbacks.library_internals.modules import WRAPPERS

_PARAMETRIZED = ".parametrizations."


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Where the layers of a model are.

    Found on all parameters, frozen ones too, so that freezing, adapters and filters rename nothing.

    Attributes:
        layer_of: parameter name to the path of its layer (tied ones once, in the model's order): a child of one of the model's
            repeated lists, else the largest submodule outside of lists, else, for a raw parameter, its own name.
        repeated: the paths that are children of lists.
        root: path of the wrapped model, around all parameters; empty for the model itself.
        base_prefixes: below `root`, prefixes of paths that names leave out, and what is around each.
    """

    layer_of: Mapping[str, str]
    repeated: frozenset[str]
    root: str
    base_prefixes: tuple[tuple[str, str], ...]

    def short_names(self, paths: Iterable[str]) -> dict[str, str]:
        """Path to its name without wrappers' prefixes (full paths where two would be equal); empty for `root`."""
        short = {path: self._shortened(path) for path in paths}
        return short if len(set(short.values())) == len(short) else {path: path for path in short}

    def _shortened(self, path: str) -> str:
        short = path[len(self.root) :].lstrip(".")
        for prefix, around in self.base_prefixes:
            if short.startswith(prefix):
                short = around + short[len(prefix) :]
        return ".".join(segment for segment in short.split(".") if segment not in WRAPPERS)


def find_layers(model: nn.Module) -> Layers:
    """The layers of `model`.

    Lists are the model's own `_no_split_modules` classes side by side, `ModuleList`, and `Sequential` of several layers;
    outermost first. No table of names. Cost: host only, linear in modules and parameters.
    """
    names = [name for name, _ in model.named_parameters()]
    repeated = _repeated(model, names)
    above = {parent for path in repeated for parent in ancestors(path)}
    root = _root(model, names)
    layer_of = {name: _layer(name, repeated, above, root) for name in names}
    return Layers(layer_of=layer_of, repeated=frozenset(repeated), root=root, base_prefixes=_base_prefixes(model, root))


def owner_path(name: str) -> str:
    """Path of the module a parameter belongs to; of the parametrized module for one of its parametrizations."""
    return name.rpartition(".")[0].split(_PARAMETRIZED)[0]


def ancestors(path: str) -> Iterator[str]:
    """Every proper dotted prefix, longest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _repeated(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Paths of the outermost list members that hold parameters."""
    holders = {parent for name in names for parent in ancestors(name)}
    declared = _declared_layer_classes(model)
    members: set[str] = set()
    for path, module in model.named_modules():
        if path and any(parent in members for parent in (path, *ancestors(path))):
            continue
        children = [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
        held = [child for child in children if child in holders]
        if _is_list_of_layers(module, held, declared):
            members.update(held)
    return members


def _declared_layer_classes(model: nn.Module) -> set[str]:
    """Names of the classes a Hugging Face model declares as its layers."""
    classes = {type(module) for module in model.modules()}
    return {name for cls in classes for name in declared_layers(cls)}


def _is_list_of_layers(module: nn.Module, held: list[str], declared: set[str]) -> bool:
    """A `ModuleList`, a `Sequential` of several layers, or a module whose only children are the model's own layers."""
    if isinstance(module, nn.ModuleList):
        return bool(held) and not isinstance(module, ParametrizationList)
    if len(held) < 2:
        return False
    types = {type(module.get_submodule(path.rpartition(".")[2])).__name__ for path in held}
    return isinstance(module, nn.Sequential) or types <= declared


def _root(model: nn.Module, names: list[str]) -> str:
    """Path of the innermost module around all parameters that is no `ModuleList` and no single layer; empty for `model`.

    So a model in a wrapper (a LightningModule that holds it as `net`) has the names it has by itself.
    """
    root, module = "", model
    while True:
        start = f"{root}.".lstrip(".")
        heads = {name[len(start) :].partition(".")[0] for name in names}
        children = dict(module.named_children())
        if len(heads) != 1 or not heads <= children.keys():
            return root
        segment = heads.pop()
        inside = _unwrapped(children[segment])
        if isinstance(inside, nn.ModuleList) or next(inside.children(), None) is None:
            return root
        root, module = start + segment, children[segment]


def _unwrapped(module: nn.Module) -> nn.Module:
    """`module` without the wrappers of compilation and checkpointing around it."""
    inner = next((child for name, child in module.named_children() if name in WRAPPERS), None)
    return module if inner is None else _unwrapped(inner)


def _layer(name: str, repeated: set[str], above: set[str], root: str) -> str:
    """The list member a parameter lies in, else the largest submodule around it without members, else its own name."""
    around_everything = {root, *ancestors(root)}
    for path in [*ancestors(name)][::-1]:  # outermost first
        if path in repeated or (path not in above and path not in around_everything):
            return path
    return name


def _base_prefixes(model: nn.Module, root: str) -> tuple[tuple[str, str], ...]:
    """Prefixes, below `root`, of Hugging Face base models (`transformer.`, `bert.`, `model.`), and what is around them.

    The class is asked, not the module: PEFT's wrappers answer with the attributes of the model inside.
    """
    prefixes = []
    for parent, module in model.get_submodule(root).named_modules():
        prefix = getattr(type(module), "base_model_prefix", None)
        if isinstance(prefix, str) and prefix:
            around = f"{parent}.".lstrip(".")
            prefixes.append((f"{around}{prefix}.", around))
    return tuple(prefixes)
