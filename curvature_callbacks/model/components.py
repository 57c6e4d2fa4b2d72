"""Components: what a parameter is for, attention, feed-forward, norm, embedding or head."""

import re
from dataclasses import dataclass
from typing import Literal, final

from torch import nn

from curvature_callbacks.library_internals.modules import is_convolution
from curvature_callbacks.model.layers import Layers, ancestors, owner_path

Component = Literal["attention", "mixer", "mlp", "conv", "norm", "embedding", "head", "other"]

# Words of attribute and class names. `(^|_)x(_|$)` is a word of an attribute: q_proj, to_q, q_bias.
_EVIDENCE: tuple[tuple[Component, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"attn|attention|multihead|mha|qkv|(^|_)(q|k|v|kv|query|key|value)(_|$)", re.IGNORECASE)),
    ("mixer", re.compile(r"mixer|mamba|ssm|recurrent", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|expert|router|moe|^(fc|lin|linear)_?\d", re.IGNORECASE)),
)
_NUMBERED = re.compile(r"^(fc|lin|linear)_?\d")  # says no more than that it is a matrix
_NORM = re.compile(r"norm|layrnorm|^(ln|bn)(_?\w?\d?)$", re.IGNORECASE)
_LAYER_SCALE = re.compile(r"layer_?scale|^(gamma|ls)_?\d?$", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|token|patch|position|^w[tp]e$|^pos(_|$)", re.IGNORECASE)
_EMBEDDING_CLASS = re.compile(r"embed|patch_?merg", re.IGNORECASE)  # no other word: families have names such as PatchTST
_HEAD = re.compile(r"head|classif|predict|unembed|pooler|^(cls|fc|score|logits?)$|_out(puts?)?$", re.IGNORECASE)


def components(model: nn.Module, layers: Layers) -> dict[str, Component]:
    """Parameter name to its component, by the words in the names and classes of the modules around it.

    | component | what |
    | --- | --- |
    | `norm` | vectors of a module that is a norm by class or name, wherever it is (also q and k norms); LayerScale gains |
    | `attention` | projections, biases, sinks and relative positions of attention |
    | `mixer` | sequence mixing that is not attention: Mamba and recurrent mixers with their convolutions and raw parameters |
    | `mlp` | feed-forward matrices: gate, up and down projections, experts, routers; any matrix in a layer that nothing tells |
    | `conv` | convolutions in layers, outside of the three above |
    | `embedding` | tables, class tokens, positions, patch embedding and merging; what feeds the layers (stem, projector) |
    | `head` | what follows the layers: classifier, language-model head with its transform, pooler; the last matrix of a stack |
    | `other` | raw vectors that nothing tells |

    In a layer, the innermost module whose attribute or class name says attention, mixer or mlp decides. Outside of layers,
    names of heads and embeddings decide, then the order: before the last layer `embedding`, after it `head`. A tied table
    belongs to its first name: `embedding` in every Hugging Face model.

    Cost: host only, linear in the parameters.
    """
    judge = _Judge(model, layers)
    return {name: judge.component(name) for name in layers.layer_of}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """One module around a parameter, or the parameter itself: attribute name and class name."""

    attribute: str
    class_name: str = ""

    def says(self, words: re.Pattern[str]) -> bool:
        return bool(words.search(self.attribute) or words.search(self.class_name))


@final
class _Judge:
    """What is known about the model when one of its parameters is judged."""

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self._layers = layers
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._parameters = dict(model.named_parameters())
        names = list(layers.layer_of)
        trunk = [i for i, name in enumerate(names) if self._is_repeated(name) and not self._in_head(name)]
        self._has_layers = bool(trunk)
        self._after_layers = set(names[trunk[-1] + 1 :]) if trunk else set()
        self._last = self._last_matrix(names)

    def component(self, name: str) -> Component:
        levels = self._levels(name)
        if self._is_norm(name, levels[:2]):
            return "norm"
        if self._in_head(name):
            return "embedding" if self._is_table(name) else "head"
        if self._is_repeated(name) or not self._has_layers:
            return self._in_layer(name, levels)
        return self._outside(name, levels)

    def _in_layer(self, name: str, levels: list[_Level]) -> Component:
        evident = self._evident(name, levels)
        if evident and not self._ends_the_stack(name, levels):
            return evident
        if self._is_embedding(name, levels):
            return "embedding"
        if is_convolution(self._owner(name)):
            return "conv"
        if self._is_matrix(name):
            return "head" if owner_path(name) == self._last else "mlp"
        return "other"

    def _ends_the_stack(self, name: str, levels: list[_Level]) -> bool:
        return owner_path(name) == self._last and bool(_NUMBERED.search(levels[1].attribute))

    def _outside(self, name: str, levels: list[_Level]) -> Component:
        if self._is_embedding(name, levels):
            return "embedding"
        if name in self._after_layers:
            return "head"
        return self._evident(name, levels) or ("embedding" if self._is_matrix(name) else "other")

    def _evident(self, name: str, levels: list[_Level]) -> Component | None:
        """What the innermost module with a word of `_EVIDENCE` says."""
        if isinstance(self._owner(name), nn.RNNBase | nn.RNNCellBase):
            return "mixer"
        for level in levels:
            for component, words in _EVIDENCE:
                if level.says(words):
                    return component
        return None

    def _levels(self, name: str) -> list[_Level]:
        """The parameter, the modules around it up to its layer, and the list that layer is in."""
        owner, layer = owner_path(name), self._layers.layer_of[name]
        paths = [path for path in (owner, *ancestors(owner)) if path == layer or path.startswith(f"{layer}.")]
        inside = [self._level(path) for path in paths]
        listed = [_Level(attribute=self._list_name(name))] if self._is_repeated(name) else []
        return [_Level(attribute=name.rpartition(".")[2]), *inside, *listed]

    def _level(self, path: str) -> _Level:
        return _Level(attribute=path.rpartition(".")[2], class_name=type(self._modules[path]).__name__ if path else "")

    def _list_name(self, name: str) -> str:
        return self._layers.layer_of[name].rpartition(".")[0].rpartition(".")[2]

    def _is_repeated(self, name: str) -> bool:
        return self._layers.layer_of[name] in self._layers.repeated

    def _in_head(self, name: str) -> bool:
        layer = self._layers.layer_of[name]
        return bool(_HEAD.search(self._list_name(name) if self._is_repeated(name) else layer.rpartition(".")[2]))

    def _is_norm(self, name: str, innermost: list[_Level]) -> bool:
        if any(level.says(_LAYER_SCALE) for level in innermost):
            return True
        norm = len(innermost) > 1 and innermost[1].says(_NORM)
        return norm and (self._parameters[name].dim() <= 1 or isinstance(self._owner(name), nn.LayerNorm | nn.RMSNorm))

    def _is_embedding(self, name: str, levels: list[_Level]) -> bool:
        return self._is_table(name) or any(
            _EMBEDDING.search(level.attribute) or _EMBEDDING_CLASS.search(level.class_name) for level in levels
        )

    def _is_table(self, name: str) -> bool:
        return isinstance(self._owner(name), nn.Embedding | nn.EmbeddingBag)

    def _is_matrix(self, name: str) -> bool:
        """A matrix, a stack of them, or the bias beside one."""
        if self._parameters[name].dim() > 1:
            return True
        beside = self._owner(name).parameters(recurse=False)
        return "bias" in name.rpartition(".")[2] and any(parameter.dim() > 1 for parameter in beside)

    def _owner(self, name: str) -> nn.Module:
        owner: nn.Module = self._modules[owner_path(name)]
        return owner

    def _last_matrix(self, names: list[str]) -> str | None:
        """The module of the last parameter when it is a layer by itself: what a plain stack ends with."""
        owner = owner_path(names[-1]) if names else ""
        return owner if owner and owner == self._layers.layer_of[names[-1]] else None
