"""What docs/architecture.md and CONTRIBUTING.md name exists: paths, modules, commands, import ranks; CITATION.cff is valid."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "curvature_callbacks"
DOCUMENTS = ("docs/architecture.md", "CONTRIBUTING.md")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

_PATH = re.compile(r"(?<![\w./-])((?:[\w-]+/)*(?:[\w.-]+\.(?:py|md|toml|txt|yaml|cff|jsonl)|[\w-]+/))(?![\w/])")
_WRITTEN_BY_RUNS = {"curvature.jsonl"}


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def paths_in(text: str) -> set[str]:
    """What looks like a file or a folder in code and drawings: `model/blocks.py`, `gram/`."""
    spans = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    spans += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    spans += re.findall(r"\]\(([^)#]+)\)", text)
    return {path for span in spans for path in _PATH.findall(span)} - _WRITTEN_BY_RUNS


def exists(path: str) -> bool:
    """Whether it is in the repository, or, as these pages abbreviate, in the package."""
    return any((root / path).is_dir() if path.endswith("/") else (root / path).is_file() for root in (ROOT, PACKAGE))


def commands_in(text: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    paths = paths_in(text_of(document))
    assert len(paths) > 10
    assert not [path for path in sorted(paths) if not exists(path)]


def test_a_path_that_is_gone_is_seen() -> None:
    text = "`model/gone.py` and `run/`\n```text\nsteps  linalg/gone/\n```\n[this](docs/gone.md)"
    assert {path for path in paths_in(text) if not exists(path)} == {"model/gone.py", "linalg/gone/", "docs/gone.md"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", text_of(document))) <= targets
    for program, *arguments in commands_in(text_of(document)):
        if program == "make":
            assert set(arguments) <= targets
        else:
            assert Path(program).name == "python"
            assert arguments[:2] == ["-m", "pytest"]
            assert all(exists(path) or (ROOT / path).is_dir() for path in arguments if "/" in path)


def test_every_target_is_explained() -> None:
    declared = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert declared is not None
    assert set(re.findall(r"^\| `make ([\w-]+)` \|", text_of("CONTRIBUTING.md"), flags=re.MULTILINE)) == set(
        declared[1].split()
    )


def test_ranks_are_those_that_are_checked() -> None:
    (contract,) = PYPROJECT["tool"]["importlinter"]["contracts"]
    written = re.findall(r"```text\n(.*?)```", text_of("docs/architecture.md"), flags=re.DOTALL)
    assert contract["layers"] in [block.splitlines() for block in written]


def test_every_room_is_on_the_map() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    named = {path.rstrip("/") for path in paths_in(text_of("docs/architecture.md")) if path.endswith("/")}
    assert rooms <= named


def test_names_stand_in_the_package() -> None:
    """Classes and functions that the pages name: `Krylov.projected()`, `block_grams`."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    text = re.sub(r"```sh.*?```", "", "".join(map(text_of, DOCUMENTS)), flags=re.DOTALL)
    classes = set(re.findall(r"`([A-Z][a-z]+[A-Za-z]*)(?:\.\w+)?(?:\(\))?`", text))
    methods = set(re.findall(r"`[A-Z][a-z]+[A-Za-z]*\.(\w+)(?:\(\))?`", text))
    assert {"Krylov", "MatrixOperator"} <= classes
    assert not [name for name in classes if f"class {name}" not in source]
    assert not [name for name in methods if f"def {name}(" not in source]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_map_is_linked(document: str) -> None:
    assert "](docs/architecture.md)" in text_of(document)


def test_hooks_run_what_make_lint_runs() -> None:
    hooks = [hook for repo in yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    commands = [hook["entry"].removesuffix(" --force-exclude") for hook in hooks]
    (recipe,) = re.findall(r"^lint: .*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    linted = [line.removesuffix(" .").replace("$(BIN)", ".venv/bin").strip() for line in recipe.splitlines()]
    assert commands == linted


def test_the_citation_file_is_valid() -> None:
    """By the schema of version 1.2.0: what it requires, and nothing it does not know."""
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation.keys() <= {"cff-version", "message", "title", "authors", "abstract", "type", "license", "keywords"}
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert all(set(author) == {"name"} for author in citation["authors"])
    assert len(set(citation["keywords"])) == len(citation["keywords"])
