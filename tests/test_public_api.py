"""What users import and call stays: every path, keyword and default of data/public_api.txt, which may only grow."""

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import curvature_callbacks

_LINES = [
    line for line in (Path(__file__).parent / "data" / "public_api.txt").read_text().splitlines() if not line.startswith("#")
]
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _resolved(path: str) -> Any:
    """What `path` below the package names: modules first, then attributes."""
    result: Any = curvature_callbacks
    for depth, segment in enumerate(path.split("."), start=1):
        if not hasattr(result, segment) and inspect.ismodule(result):
            importlib.import_module("curvature_callbacks." + ".".join(path.split(".")[:depth]))
        result = getattr(result, segment)
    return result


def _recorded_parameters(text: str) -> tuple[list[str], dict[str, str | None]]:
    """Names that may be passed by position, in order, and name to the written default (None: required)."""
    definition = ast.parse(f"def recorded({text}: ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults = dict(zip(positional, [*missing, *arguments.defaults], strict=True))
    defaults |= {argument.arg: value for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
    return positional, {name: None if value is None else ast.unparse(value) for name, value in defaults.items()}


def _written(parameter: inspect.Parameter) -> str | None:
    """The default as `ast` writes it, `...` for an object without a literal; None for a required parameter."""
    if parameter.default is inspect.Parameter.empty:
        return None
    text = repr(parameter.default)
    return "..." if text.startswith("<") else ast.unparse(ast.parse(text, mode="eval"))


def breaks(function: Callable[..., Any], text: str) -> list[str]:
    """In words, which calls that `text` allows would fail or mean something else."""
    positional, defaults = _recorded_parameters(text)
    parameters = {name: each for name, each in inspect.signature(function).parameters.items() if name != "self"}
    named = {name: each for name, each in parameters.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    by_position = [name for name, each in named.items() if each.kind in _POSITIONAL]
    found = [f"`{name}` is gone" for name in defaults if name not in named]
    found += [
        f"`{name}` had the default {default}, now {_written(named[name])}"
        for name, default in defaults.items()
        if name in named and default != _written(named[name])
    ]
    if by_position[: len(positional)] != positional:
        found.append(f"by position were passed {positional}, now {by_position}")
    return found + [f"`{name}` is required" for name, each in named.items() if name not in defaults and _written(each) is None]


@pytest.mark.parametrize("line", _LINES)
def test_what_is_public_is_there_with_its_keywords_and_defaults(line: str) -> None:
    path, bracket, parameters = line.partition("(")
    found = _resolved(path)
    if bracket:
        assert callable(found)
        assert not breaks(found, parameters), line


def test_all_public_names_are_listed() -> None:
    assert {line.partition("(")[0].partition(".")[0] for line in _LINES} >= set(curvature_callbacks.__all__)


def test_old_and_new_path_of_the_local_space_are_one_class() -> None:
    assert _resolved("linalg.space.LocalSpace") is _resolved("space.LocalSpace")


def test_results_are_frozen_dataclasses() -> None:
    for name in ("Density", "Eigenpairs", "FisherSpectra", "KFACCoverageReport", "Record", "Spectrum"):
        cls = getattr(curvature_callbacks, name)
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("model, *, k=10, seed=0", "`seed` had the default 0, now 1"),
        ("model, *, which='BE', k=10, seed=1", "`which` is gone"),
        ("model, batches, *, k=10, seed=1", "`batches` is gone"),
        ("*, k=10, seed=1", "`model` is required"),
        ("k, model, *, seed=1", "by position were passed"),
    ],
)
def test_a_changed_signature_is_seen(changed: str, words: str) -> None:
    def function(model: Any, *, k: int = 10, seed: int = 1) -> None: ...

    assert not breaks(function, "model, *, k=10, seed=1)")
    assert not breaks(function, "model, *, seed=1)")
    assert any(words in text for text in breaks(function, changed + ")"))
