"""Private names of libraries are used in library_internals and in the two adapters, nowhere else in the package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import curvature_callbacks
from tests.library_internals.names import FRAMEWORKS, FSDP, MODULES, TENSORS

PACKAGE = Path(curvature_callbacks.__file__).parent
MAY_USE_THEM = ("library_internals", "lightning", "transformers")
COMMON_WORDS = {"module", "param_name", "alias_info", "is_mutable", "expired", "saved_tensors"}  # which others use too
KNOWN = {internal.name for internal in (*TENSORS, *MODULES, *FSDP, *FRAMEWORKS)} - COMMON_WORDS | {"aten"}
PRIVATE_MODULES = ("torch.multiprocessing.reductions", "torch.utils._python_dispatch", "torch._C", "torch.distributed.fsdp._")
# Not of a library, though it looks like one: attributes of a namedtuple (public), of Python itself.
ALLOWED = {"_fields", "_asdict", "_replace", "_getframe"}


def trees() -> dict[Path, ast.AST]:
    return {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, fields and attributes of `self` that a module makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            yield node.attr


def is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names of libraries that a module uses, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_own(node.value) and is_foreign(node.attr, own):
            yield f"{node.lineno}: .{node.attr}"
        elif isinstance(node, ast.Constant) and node.value in KNOWN:
            yield f"{node.lineno}: {node.value!r}"
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("curvature_callbacks"):
            private = [alias.name for alias in node.names if alias.name.startswith("_") or alias.name in KNOWN]
            if private or (node.module or "").startswith(PRIVATE_MODULES):
                yield f"{node.lineno}: from {node.module} import {', '.join(private)}"


def is_foreign(name: str, own: set[str]) -> bool:
    is_private = name.startswith("_") and not name.startswith("__") and name not in own | ALLOWED
    return is_private or name in KNOWN


OWN = {name for tree in trees().values() for name in defined(tree)}


def test_private_names_stand_in_one_room_and_the_adapters() -> None:
    used = {str(path): [*foreign(tree, OWN)] for path, tree in trees().items() if path.parts[0] not in MAY_USE_THEM}
    assert {path: lines for path, lines in used.items() if lines} == {}, "move these behind a function of library_internals"


@pytest.mark.parametrize(
    "line",
    [
        "module._parameters",
        "getattr(node, '_forward_cls')",
        "tensor._surprise",
        "torch.ops.aten.relu",
        "from torch.nn.modules.conv import _ConvNd",
        "from torch.multiprocessing.reductions import StorageWeakRef",
    ],
)
def test_a_private_name_elsewhere_is_found(line: str) -> None:
    assert [*foreign(ast.parse(line), OWN)]


@pytest.mark.parametrize("line", ["self._surprise", "row._fields", "value.__dict__", "'_standard_error'"])
def test_names_of_ones_own_are_not(line: str) -> None:
    assert not [*foreign(ast.parse(line), OWN)]
