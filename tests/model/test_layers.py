"""Names are those of the model, whatever is wrapped around it, frozen in it or added to it."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from curvature_callbacks.model.blocks import group_blocks
from curvature_callbacks.model.layers import find_layers
from tests.cases import CASES, ConvNet
from tests.families import FAMILIES, family


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


class Wrapped(nn.Module):
    """As a LightningModule holds its network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net = inner


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)


class Pair(nn.Module):
    """Two models side by side, a temperature beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))
        self.student, self.teacher = family("bert"), family("gpt2")


PLAIN: dict[str, nn.Module] = {
    "convnet": ConvNet(),
    "lenet": LeNet(),
    "encoder": CASES["encoder"].build(),
    "mlp": CASES["mlp"].build(),
}


@pytest.mark.parametrize("structure", ["layer", "component", "module"])
@pytest.mark.parametrize("name", [*FAMILIES, *PLAIN])
def test_wrapping_a_model_renames_nothing(name: str, structure: str):
    model = PLAIN[name] if name in PLAIN else family(name)
    wrapped = Wrapped(Wrapped(model))
    bare = group_blocks(model, trainable(model), structure)
    found = group_blocks(wrapped, trainable(wrapped), structure)
    assert found == {block: tuple(f"net.net.{member}" for member in members) for block, members in bare.items()}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiling_and_checkpointing_renames_nothing(name: str):
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = inner

    model = family(name)
    expected = [list(group_blocks(model, trainable(model), structure)) for structure in ("component", "module")]
    base = model.transformer.h if name == "gpt2" else model.model.layers
    base[0], base[1] = Checkpointed(base[0]), torch.compile(base[1], backend="eager")
    for held in (model, Wrapped(torch.compile(model, backend="eager"))):
        found = [list(group_blocks(held, trainable(held), structure)) for structure in ("component", "module")]
        assert found == expected


def test_compiling_a_stack_renames_nothing():
    stack = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    for model in (stack, Wrapped(stack), Wrapped(torch.compile(stack, backend="eager"))):
        assert list(group_blocks(model, trainable(model))) == ["0", "2"]


@pytest.mark.parametrize("structure", ["layer", "component", "module"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "llama", "t5", "vit"])
def test_freezing_renames_nothing(name: str, structure: str):
    model = family(name)
    before = group_blocks(model, trainable(model), structure)
    for index, (_, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(index % 5 == 3)
    left = set(trainable(model))
    kept = {block: tuple(member for member in members if member in left) for block, members in before.items()}
    assert group_blocks(model, trainable(model), structure) == {block: members for block, members in kept.items() if members}


def test_one_trainable_layer_keeps_its_number():
    model = family("gpt2").requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    assert list(group_blocks(model, trainable(model))) == ["h.1"]
    assert list(group_blocks(model, trainable(model), "component")) == ["h.1/norm", "h.1/attention", "h.1/mlp"]


def test_blocks_of_some_parameters_only():
    model = family("gpt2")
    names = [name for name in trainable(model) if "attn" in name]
    assert group_blocks(model, names) == {"h.0": tuple(names[:4]), "h.1": tuple(names[4:])}


def test_two_models_side_by_side():
    model = Pair()
    student = ["embeddings", "encoder.layer.0", "encoder.layer.1", "cls"]
    teacher = ["wte", "wpe", "h.0", "h.1", "ln_f"]
    expected = ["temperature", *(f"student.{name}" for name in student), *(f"teacher.{name}" for name in teacher)]
    assert list(group_blocks(model, trainable(model))) == expected


class LowRank(nn.Module):
    """A PEFT LoRA layer by attribute names: the frozen base and adapters in dictionaries of their own."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, outputs, bias=False)})


class Forwarding(nn.Module):
    """PEFT's wrappers answer with the attributes of what they hold."""

    held: str

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(self.held, inner)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.held), name)


class LoraModel(Forwarding):
    held = "model"


class PeftModel(Forwarding):
    held = "base_model"


def adapted(name: str) -> tuple[nn.Module, list[str]]:
    """A family with adapters in attention and the feed-forward, and the modules they are on."""
    model = family(name).requires_grad_(False)
    targets = ("attn.c_attn", "mlp.c_fc") if name == "gpt2" else ("self_attn.q_proj", "mlp.down_proj")
    for layer in model.transformer.h if name == "gpt2" else model.model.layers:
        for target in targets:
            parent, attribute = layer.get_submodule(target.partition(".")[0]), target.partition(".")[2]
            setattr(parent, attribute, LowRank(getattr(parent, attribute), 8, 8))
    return PeftModel(LoraModel(model)), list(targets)


@pytest.mark.parametrize(("name", "layer"), [("gpt2", "h"), ("llama", "layers")])
def test_adapters_alone_appear_under_the_names_of_the_model(name: str, layer: str):
    model, (attention, mlp) = adapted(name)
    names = trainable(model)
    assert len(names) == 2 * 2 * 2
    blocks = group_blocks(model, names)
    assert list(blocks) == [f"{layer}.0", f"{layer}.1"]
    parts = group_blocks(model, names, "component")
    assert list(parts) == [f"{layer}.{i}/{part}" for i in (0, 1) for part in ("attention", "mlp")]
    assert all(len(members) == 2 and all("lora_" in member for member in members) for members in parts.values())
    adapters = [f"{layer}.{i}.{target}.lora_{ab}.default" for i in (0, 1) for target in (attention, mlp) for ab in "AB"]
    assert list(group_blocks(model, names, "module")) == adapters
    assert list(group_blocks(model, names, "parameter")) == names


def test_adapters_beside_another_parameter():
    """Not the wrappers but the class of the model inside says which prefix adds nothing."""
    model, _ = adapted("llama")
    model.get_submodule("base_model.model.lm_head").requires_grad_(True)
    whole = Wrapped(model)
    whole.temperature = nn.Parameter(torch.zeros(()))
    parts = ("layers.0", "layers.1", "lm_head")
    assert list(group_blocks(whole, trainable(whole))) == ["temperature", *(f"net.base_model.model.{part}" for part in parts)]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.gain


def test_a_parametrization_belongs_to_the_layer_it_is_on():
    """`ParametrizationList` is a `ModuleList`, and no list of layers."""
    model = nn.ModuleDict({"stem": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    parametrize.register_parametrization(model["stem"], "weight", Scale())
    stem = ("stem.bias", "stem.parametrizations.weight.original", "stem.parametrizations.weight.0.gain")
    blocks = group_blocks(model, trainable(model))
    assert blocks == {"stem": stem, "head": ("head.weight", "head.bias")}


def test_a_layer_used_twice_is_one_block():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(2, 2))
    assert group_blocks(model, trainable(model)) == {"0": ("0.weight", "0.bias"), "4": ("4.weight", "4.bias")}


class Own(nn.Linear):
    pass


class Declared(nn.Module):
    """Layers side by side in no list, by a class the model declares."""

    _no_split_modules = ("Own",)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.trunk = nn.ModuleDict({"first": Own(2, 2), "second": Own(2, 2)})
        self.tail = nn.ModuleDict({"first": Own(2, 2), "second": nn.Linear(2, 2)})


def test_the_classes_a_model_declares_are_its_layers():
    model = Declared()
    assert list(group_blocks(model, trainable(model))) == ["stem", "trunk.first", "trunk.second", "tail"]


def test_names_that_would_be_equal_stay_whole():
    class Twice(nn.Module):
        base_model_prefix = "net"

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"head": nn.Linear(2, 2), "layers": nn.ModuleList([nn.Linear(2, 2)])})
            self.head = nn.Linear(2, 2)

    model = Twice()
    assert set(group_blocks(model, trainable(model))) == {"net.head", "net.layers.0", "head"}


def test_layers_see_frozen_parameters_too():
    model = family("whisper")
    assert not model.model.encoder.embed_positions.weight.requires_grad
    layers = find_layers(model)
    assert layers.layer_of["model.encoder.embed_positions.weight"] == "model.encoder.embed_positions"
    assert "encoder.embed_positions" not in group_blocks(model, trainable(model))
