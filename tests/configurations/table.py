"""The table of configurations in docs/configurations.md, written by running every one of them.

python -m tests.configurations.table docs/configurations.md
"""

import contextlib
import io
import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.configurations import lightning_cases, lightning_sessions, model_cases, transformers_cases, transformers_sessions
from tests.processes import cases as process_cases
from tests.processes.ranks import Ranks

Row = tuple[str, ...]

INTRODUCTION = """# Configurations

Written by `make configurations`, which trains each of these twice from the same seed, with and without the callback, and
compares bit by bit: parameters, buffers, optimizer state, everything logged, the global generators, the `training` flag of
every module. "Measured" means that every measurement of every probe in it succeeded. The same runs are tests (`make test`, the
slow ones `make test-all`). Run with {versions}, on a CPU.
"""


def main(path: Path) -> None:
    """Run everything; exit with an error where something differs."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    packages = ("torch", "lightning", "transformers", "accelerate", "peft")
    lines = [INTRODUCTION.format(versions=", ".join(f"{name} {version(name)}" for name in packages))]
    training = ("configuration", "training is the same bits", "measured")
    lightning = [outcome(lightning_sessions.assert_same_bits, case) for case in lightning_cases.CASES.values()]
    transformers = [outcome(transformers_sessions.assert_same_bits, case) for case in transformers_cases.CASES.values()]
    lines += table("Lightning", training, lightning) + table("Hugging Face Trainer", training, transformers)
    for size in (2, 4):
        ranks = Ranks(size)
        found = [
            outcome(lambda case, directory, ranks=ranks: process_cases.assert_same_bits(case, ranks, directory), case)
            for case in process_cases.CASES.values()
        ]
        ranks.close()
        lines += table(f"{size} processes (gloo)", training, found)
    lines += models(model_cases.CASES)
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    if "**no**" in text:
        sys.exit("some configuration differs or was not measured: see the table")


def outcome(check: Callable[..., Any], case: Any) -> Row:
    """Title and verdicts of one configuration."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        try:
            check(case, Path(directory))
        except Exception as error:
            traceback.print_exc()
            return case.title, f"**no**: {type(error).__name__}", "**no**"
    return case.title, "yes", "yes"


def models(cases: Mapping[str, Any]) -> list[str]:
    """Model against operator."""
    rows: list[Row] = []
    operators: list[str] = []
    for case in cases.values():
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            try:
                found = model_cases.check(case, Path(directory))
            except Exception as error:
                traceback.print_exc()
                found = dict.fromkeys(operators, f"**no**: {type(error).__name__}")
        operators = list(found)
        rows.append((case.title, *found.values()))
    return table("Models (tiny, through the Trainer; training the same bits in all)", ("model", *operators), rows)


def table(title: str, head: Row, rows: Iterable[Row]) -> list[str]:
    """A section with a table."""
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return [*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows), ""]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
