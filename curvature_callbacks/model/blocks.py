"""Blocks: named, ordered, disjoint groups of the trainable parameters."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from torch import nn

from curvature_callbacks.errors import ConfigurationError, check_choice
from curvature_callbacks.record import tag_segment

BlockStructure = Literal["layer", "parameter", "none"]
Blocks = Mapping[str, tuple[str, ...]]

WHOLE = "model"  # the single block of structure `none`


def group_blocks(model: nn.Module, names: Iterable[str], structure: BlockStructure = "layer") -> Blocks:
    """Block name to parameter names; every name in exactly one block, in the model's order.

    `layer`: the children of the model's repeated lists (its own `_no_split_modules` classes, `ModuleList`, `Sequential`;
    outermost first) are blocks, and so is each largest submodule that contains no such list. This gives GPT-2 `h.i`, BERT
    `encoder.layer.i`, Llama `layers.i`, T5 `encoder.block.i` and `decoder.block.i`, Swin and ConvNeXt stages, torchvision
    ResNets `layer1.0`, with embeddings, final norms and heads beside them, without a table of names. A tied or shared
    parameter belongs to the block that names it first.

    Args:
        model: the model.
        names: parameter names, as in `named_parameters()` (tied ones once).
        structure: `layer`; `parameter`, one block per tensor; `none`, one block `model`.

    Raises:
        ConfigurationError: unknown structure, or two blocks that no logger could tell apart.
    """
    check_choice("block_structure", structure, get_args(BlockStructure))
    ordered = list(names)
    if structure == "none":
        return {WHOLE: tuple(ordered)}
    if structure == "parameter":
        return _distinct({name: (name,) for name in ordered})
    return _distinct(_layer_blocks(model, ordered))


def _layer_blocks(model: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    members = _block_paths(model, names)
    above = {parent for path in members for parent in _ancestors(path)}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name, members, above), []).append(name)
    short = _short_names(model, list(groups))
    return {short[path]: tuple(group) for path, group in groups.items()}


def _block_paths(model: nn.Module, names: list[str]) -> set[str]:
    """Paths of the outermost list members that hold parameters."""
    holders = {parent for name in names for parent in _ancestors(name)}
    own_classes = _own_block_classes(model)
    members: set[str] = set()
    for path, module in model.named_modules():
        if path and any(parent in members for parent in (path, *_ancestors(path))):
            continue
        children = [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
        held = [child for child in children if child in holders]
        if _is_list_of_blocks(module, held, own_classes):
            members.update(held)
    return members


def _own_block_classes(model: nn.Module) -> set[str]:
    """Names of the classes a Hugging Face model declares as its blocks."""
    declared = (getattr(module, "_no_split_modules", None) for module in model.modules())
    return {name for names in declared if names for name in names if "Embedding" not in name}


def _is_list_of_blocks(module: nn.Module, held: list[str], own_classes: set[str]) -> bool:
    """A `ModuleList`, a `Sequential` of several layers, or a module whose only children are the model's own blocks."""
    if isinstance(module, nn.ModuleList):
        return bool(held)
    if len(held) < 2:
        return False
    types = {type(module.get_submodule(path.rpartition(".")[2])).__name__ for path in held}
    return isinstance(module, nn.Sequential) or types <= own_classes


def _group(name: str, members: set[str], above: set[str]) -> str:
    """The block member a parameter lies in, else the largest submodule around it without members, else its own name."""
    parents = list(_ancestors(name))[::-1]  # outermost first
    for path in parents:
        if path in members or path not in above:
            return path
    return name


def _ancestors(path: str) -> Iterable[str]:
    """Every proper dotted prefix, longest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _short_names(model: nn.Module, paths: list[str]) -> dict[str, str]:
    """Paths without wrapper prefixes, as long as they stay distinct."""
    short = {path: _without_base_prefix(model, path) for path in paths}
    common = _common_prefix(list(short.values()))
    short = {path: name[len(common) :] for path, name in short.items()}
    return short if len(set(short.values())) == len(paths) else {path: path for path in paths}


def _without_base_prefix(model: nn.Module, path: str) -> str:
    """`path` without the prefix of the Hugging Face base model around it (`transformer.`, `bert.`, `model.`)."""
    for parent, module in model.named_modules():
        prefix: Any = getattr(module, "base_model_prefix", None)
        if isinstance(prefix, str) and prefix and path.startswith(start := f"{parent}.{prefix}.".lstrip(".")):
            return f"{parent}.".lstrip(".") + path[len(start) :]
    return path


def _common_prefix(names: list[str]) -> str:
    """The dotted prefix all `names` share, with its dot."""
    if len(names) < 2:
        return ""
    split = [name.split(".")[:-1] for name in names]
    shared = []
    for segments in zip(*split, strict=False):
        if len(set(segments)) > 1:
            break
        shared.append(segments[0])
    return ".".join(shared) + "." if shared else ""


def _distinct(blocks: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    tags: dict[str, str] = {}
    for name in blocks:
        other = tags.setdefault(tag_segment(name), name)
        if other != name:
            raise ConfigurationError(f"blocks `{other}` and `{name}` have the same tag: rename one of the submodules.")
    return blocks
