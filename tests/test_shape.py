"""Modules and functions have the size that CONTRIBUTING.md says, and tables cannot be written to."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WRITTEN = [
    path for folder in ("curvature_callbacks", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
PACKAGE = [path for path in WRITTEN if path.is_relative_to(ROOT / "curvature_callbacks")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MOST_LINES, MOST_LINES_OF_TESTS, MOST_LINES_OF_A_FUNCTION = 300, 400, 40


def oversized(paths: list[Path], limit: int) -> list[str]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [f"{path.relative_to(ROOT)}: {length}" for path, length in lengths.items() if length > limit]


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without the docstring, and without the signature where that is a promise to users."""
    is_public = not function.name.startswith("_") or function.name == "__init__"
    start = function.body[0].lineno if is_public else function.lineno
    first = function.body[0]
    has_docstring = ast.get_docstring(function, clean=False) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring and first.end_lineno is not None else 0
    assert function.end_lineno is not None
    return function.end_lineno - start + 1 - docstring


def long_functions(source: str) -> list[str]:
    return [function.name for function in functions(source) if num_lines(function) > MOST_LINES_OF_A_FUNCTION]


def open_tables(source: str) -> list[str]:
    """Constants that hold a dict which the type checker would let anybody write to."""
    found = []
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        if not isinstance(target, ast.Name) or not target.id.isupper():
            continue
        value = node.value  # type: ignore[union-attr]
        is_dict = isinstance(value, ast.Dict | ast.DictComp) or (
            isinstance(value, ast.Call) and "dict" in ast.unparse(value.func)
        )
        if is_dict and "Mapping[" not in (ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""):
            found.append(target.id)
    return found


def test_modules_are_short() -> None:
    assert len(WRITTEN) > 150
    assert not oversized(WRITTEN, MOST_LINES)
    assert not oversized(TESTS, MOST_LINES_OF_TESTS)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    assert not long_functions(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "arguments", "num_statements", "is_long"),
    [
        ("_private", 0, 39, False),
        ("_private", 0, 40, True),
        ("_private", 10, 30, True),
        ("public", 40, 40, False),
        ("public", 0, 41, True),
        ("__init__", 40, 40, False),
    ],
)
def test_a_long_function_is_seen(name: str, arguments: int, num_statements: int, is_long: bool) -> None:
    signature = "".join(f"    a{number},\n" for number in range(arguments))
    body = '    """One.\n\n    Two.\n    """\n' + "    pass\n" * num_statements
    assert bool(long_functions(f"def {name}(\n{signature}):\n{body}" if arguments else f"def {name}():\n{body}")) == is_long


def test_tables_are_read_only() -> None:
    assert not {path.name: found for path in PACKAGE if (found := open_tables(path.read_text(encoding="utf-8")))}


@pytest.mark.parametrize(
    ("table", "is_open"),
    [
        ("RULES: Final = {1: 2}", True),
        ("RULES = dict.fromkeys((1, 2), 3)", True),
        ("RULES: Final[dict[int, int]] = {n: n for n in range(3)}", True),
        ("RULES: Final[Mapping[int, int]] = {1: 2}", False),
        ("RULES: Final = MappingProxyType({1: 2})", False),
        ("seen = {}", False),
    ],
)
def test_an_open_table_is_seen(table: str, is_open: bool) -> None:
    assert bool(open_tables(table)) == is_open
