"""What both callbacks promise."""

import copy
import inspect
import pickle
import re
from typing import Any, get_type_hints

import pytest

from curvature_callbacks import CurvatureMonitor
from curvature_callbacks.lightning.callback import CurvatureCallback as LightningCallback
from curvature_callbacks.run.settings import Settings
from curvature_callbacks.transformers.callback import CurvatureCallback as TransformersCallback
from tests.lightning_runs import pair_loss
from tests.training_cases import callback_options

CALLBACKS = [LightningCallback, TransformersCallback]


@pytest.fixture(params=CALLBACKS, ids=["lightning", "transformers"])
def kind(request: Any) -> Any:
    return request.param


def parameters(kind: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


def test_both_have_the_same_name_and_the_same_arguments() -> None:
    lightning, transformers = map(parameters, CALLBACKS)
    assert LightningCallback.__name__ == TransformersCallback.__name__ == "CurvatureCallback"
    assert list(lightning) == list(transformers)
    assert {name: one.default for name, one in lightning.items()} == {name: one.default for name, one in transformers.items()}
    types = [{name: str(one.annotation) for name, one in kind.items()} for kind in (lightning, transformers)]
    assert types[1].pop("loss_fn") == types[0].pop("loss_fn").removesuffix("]") + ", typing.Literal['trainer']]"
    assert types[0] == types[1]


def described_arguments(kind: Any) -> dict[str, str]:
    """Argument to its description, all lines of it."""
    arguments = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(kind) or "", re.S)
    assert arguments is not None
    described = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)$", arguments.group(1), re.M)
    return {name: " ".join(text.split()) for name, text in described}


def test_both_describe_their_arguments_in_the_same_words() -> None:
    lightning, transformers = map(described_arguments, CALLBACKS)
    assert list(lightning) == list(transformers) == list(parameters(LightningCallback))
    first = "optimizer steps between probes"
    assert lightning.pop("every_n_steps").startswith(first)
    assert transformers.pop("every_n_steps").startswith(first)
    shared = lightning.pop("loss_fn").replace("(module, batch)", "(model, batch)")
    assert transformers.pop("loss_fn").startswith(shared)
    assert lightning == transformers


class TestCallback:
    def test_it_needs_no_argument(self, kind: Any) -> None:
        assert kind().history == []

    def test_every_argument_has_a_type_and_a_default_a_command_line_can_give(self, kind: Any) -> None:
        hints = get_type_hints(kind.__init__)
        for name, parameter in parameters(kind).items():
            assert name in hints
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            assert parameter.default is None or type(parameter.default) in (int, str, float, bool)

    def test_its_arguments_are_the_settings(self, kind: Any) -> None:
        """Written out in each signature, for LightningCLI and for readers; names, order, types and defaults are the same."""
        settings = parameters(Settings)
        assert list(parameters(kind)) == list(settings)
        assert {name: each.default for name, each in parameters(kind).items()} == {
            name: each.default for name, each in settings.items()
        }
        types = {name: str(each.annotation) for name, each in parameters(kind).items() if name not in ("measure", "loss_fn")}
        assert types == {name: str(settings[name].annotation) for name in types}

    def test_defaults_are_those_of_the_monitor(self, kind: Any) -> None:
        monitor = inspect.signature(CurvatureMonitor).parameters
        renamed = {"every_n_steps": "when", "loss_fn": "loss"}
        of_frameworks = {
            "schedule",
            "probe_dataset",
            "probe_dataloader",
            "max_sequence_length",
        }  # a monitor gets `probes`, `when`
        for name, parameter in parameters(kind).items():
            if name in of_frameworks:
                assert parameter.default is None
                continue
            assert parameter.default == monitor[renamed.get(name, name)].default, name

    def test_it_pickles_before_training(self, kind: Any) -> None:
        callback = kind(**callback_options(loss_fn=pair_loss))
        again = pickle.loads(pickle.dumps(callback))
        assert again._settings == callback._settings
        assert again.history == []
        assert copy.deepcopy(callback)._settings == callback._settings

    def test_it_has_no_method_a_framework_would_overwrite(self, kind: Any) -> None:
        assert "log" not in vars(kind)
        assert "log_dict" not in vars(kind)
        assert "_log_dict" not in vars(kind)

    def test_history_cannot_be_replaced(self, kind: Any) -> None:
        with pytest.raises(AttributeError):
            kind().history = []

    def test_its_docstring_tells_cost_errors_and_tags(self, kind: Any) -> None:
        documentation = inspect.getdoc(kind) or ""
        assert all(part in documentation for part in ("Args:", "Attributes:", "Raises:", "Cost:", "curvature/probe_seconds"))
