"""Nobody imports a framework they did not ask for."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import curvature_callbacks

OPTIONAL = {"lightning", "pytorch_lightning", "transformers", "accelerate", "tensorboard", "matplotlib", "torchmetrics"}
EXTRA = {"scipy", "sklearn", "pandas", "wandb"}


@cache
def imported_by(statement: str, *, after: str) -> frozenset[str]:
    """Top-level modules that `statement` adds to a fresh process that has run `after`."""
    code = f"""
import sys
{after}
before = {{name.partition(".")[0] for name in sys.modules}}
{statement}
print(*({{name.partition(".")[0] for name in sys.modules}} - before))
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return frozenset(result.stdout.split())


def test_the_package_imports_torch_and_nothing_optional() -> None:
    """Nor to recognise the loggers of frameworks."""
    added = imported_by("import curvature_callbacks.sinks.loggers", after="import torch, torch.utils.data")
    assert "curvature_callbacks" in added
    assert not added & (OPTIONAL | EXTRA | {"numpy"})


@pytest.mark.parametrize(
    ("adapter", "framework"),
    [
        ("lightning", "import lightning.pytorch"),
        pytest.param("transformers", "from transformers import Trainer", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_imports_its_own_framework_only(adapter: str, framework: str) -> None:
    """What the framework itself drags in (lightning: torchmetrics, which imports transformers if it finds it) is its own."""
    added = imported_by(f"import curvature_callbacks.{adapter}", after=framework)
    assert "curvature_callbacks" in added
    assert not added & (OPTIONAL | EXTRA)


def test_all_names_exist_and_are_sorted() -> None:
    assert curvature_callbacks.__all__ == sorted(curvature_callbacks.__all__)
    assert all(getattr(curvature_callbacks, name) is not None for name in curvature_callbacks.__all__)


@pytest.mark.parametrize("adapter", ["lightning", "transformers"])
def test_a_missing_framework_is_named_with_the_extra_to_install(adapter: str, monkeypatch: Any) -> None:
    path = f"curvature_callbacks.{adapter}"
    for name in [name for name in sys.modules if name == path or name.startswith(f"{path}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("curvature_callbacks._optional.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"pip install 'curvature-callbacks\[{adapter}\]'"):
        importlib.import_module(f"curvature_callbacks.{adapter}")


def test_no_module_imports_numpy_at_the_top() -> None:
    root = Path(curvature_callbacks.__file__).parent
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.partition(".")[0] in ("numpy", "scipy", "matplotlib")], path.name


def imports_of_the_package(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every `from curvature_callbacks... import` in a file, also within functions."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    of_package = [node for node in nodes if node.module and node.module.partition(".")[0] == "curvature_callbacks"]
    return [(node.module or "", alias.name) for node in of_package for alias in node.names]


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_scripts_import_what_is_there(folder: str) -> None:
    """Benchmarks are run by hand, and some need packages that tests have not."""
    scripts = sorted((Path(__file__).parent.parent / folder).glob("*.py"))
    found = {(module, name) for script in scripts for module, name in imports_of_the_package(script)}
    assert found
    assert not [(module, name) for module, name in sorted(found) if not _is_importable(module, name)]


def _is_importable(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.import_module(f"{module}.{name}"))
    except ModuleNotFoundError:
        return False


def test_no_two_classes_or_functions_share_a_name() -> None:
    """One name, one meaning: a reader who searches for a name finds one definition. Both callbacks have one name."""
    root = Path(curvature_callbacks.__file__).parent
    homes: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(root)))
    shared = {name: paths for name, paths in homes.items() if len(paths) > 1}
    assert set(shared) == {"CurvatureCallback"}, shared
