"""Every example runs as a user would run it, and leaves what it promises."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from curvature_callbacks import Record, read_records
from curvature_callbacks.record import tag_segment
from tests.sinks.tag_cases import written_tags

EXAMPLES = Path(__file__).parent.parent / "examples"
BLOCKS = {
    "lightning_digits": ["stem", "blocks.0", "blocks.1", "blocks.2", "head"],
    "transformers_char_lm": ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "lm_head"],
    "plain_loop": ["0", "2", "4"],
    "custom_measurement": ["0", "2"],
    "residual_hessian": ["0", "2"],
}


def test_all_examples_are_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("[!_]*.py")} == set(BLOCKS)


DEMO = ("lightning_digits", "transformers_char_lm")  # the others are run by the slow tests


@pytest.mark.parametrize("name", [name if name in DEMO else pytest.param(name, marks=pytest.mark.slow) for name in BLOCKS])
def test_example(name: str, tmp_path: Path) -> None:
    for package, extra in [("lightning", "lightning_digits"), ("transformers", "transformers_char_lm")]:
        if name == extra:
            pytest.importorskip(package)
    logdir = tmp_path / "runs" / name
    logdir.mkdir(parents=True)
    (logdir / "events.out.tfevents.0.earlier").touch()
    (logdir / "curvature.jsonl").write_text(Record(step=7, measurement="probe").to_json() + "\n")

    done = _run(name, logdir, tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no library's warnings
    assert len(done.stdout.splitlines()) <= 5 + len(BLOCKS[name])
    assert _table_blocks(done.stdout) == BLOCKS[name]
    assert f"tensorboard --logdir {logdir}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    records = read_records(logdir / "curvature.jsonl")
    assert records[0].metadata["blocks"] == BLOCKS[name]
    assert sum(record.measurement == "probe" for record in records) == 1
    assert not any(record.failed for record in records)
    assert all(record.scalars["residual_lambda_max"] >= 0 for record in records if record.measurement == "hessian")
    tags = _tags(logdir, "scalars")
    assert {"curvature/hessian_lambda_max", "curvature/probe_seconds"} <= tags
    last = BLOCKS[name][-1].replace(".", "_").zfill(2)
    assert {f"curvature_empirical_fisher_condition_number/{last}", f"curvature_hessian_lambda_max/{last}"} <= tags
    assert _documented_tags(name) <= tags | _tags(logdir, "images")


def test_the_custom_measurement_writes_what_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = runpy.run_path(str(EXAMPLES / "custom_measurement.py"))
    tags = written_tags(example["GradientNorm"](), model=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    assert _documented_tags("custom_measurement") == tags["scalars"] | tags["figures"]


def _run(name: str, logdir: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--logdir", str(logdir), "--max-steps", "2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120, check=False)


def _table_blocks(output: str) -> list[str]:
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("block "))
    rows = [line.split() for line in lines[start + 1 :]]
    return [row[0] for row in rows if len(row) == 4]


def _tags(logdir: Path, summary: str) -> set[str]:
    (path,) = logdir.glob("events.out.tfevents.*")
    events = EventAccumulator(str(path))
    events.Reload()
    return set(events.Tags()[summary])


def _documented_tags(name: str) -> set[str]:
    """The tags between backticks in an example, those of a `<block>` for all its blocks."""
    tags = re.findall(r"`(curvature[^`\s]*/[^`\s]+)`", (EXAMPLES / f"{name}.py").read_text())
    return {tag.replace("<block>", tag_segment(block)) for tag in tags for block in BLOCKS[name]}
