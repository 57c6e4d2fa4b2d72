"""The README is true: its snippets run, its tags are those the docstrings promise, its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvature_callbacks import (
    CurvatureMonitor,
    EdgeRatio,
    FisherSpectrum,
    GradientNoise,
    JSONLinesSink,
    KFACCoverage,
    KFACQuality,
    SpectralDensity,
    TopEigenpairs,
    read_records,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def _framework(snippet: str) -> str:
    found = re.search(r"curvature_callbacks\.(lightning|transformers) import", snippet)
    return found.group(1) if found else "torch"


@pytest.fixture
def in_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the file of an earlier run."""
    monkeypatch.chdir(tmp_path)
    model, loader = _classifier(), _loader()
    CurvatureMonitor(model, probes=loader, loss="cross_entropy", sinks=[JSONLinesSink("curvature.jsonl")]).step(0)
    return tmp_path


def test_there_is_a_snippet_for_every_way_in() -> None:
    assert len(SNIPPETS) == README.count("```python") == 7
    assert {_framework(snippet) for snippet in SNIPPETS} == {"torch", "lightning", "transformers"}


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # Lightning's advice; the data is in memory
    "ignore:.*LeafSpec",  # Lightning 2.6 on torch 2.13
    "ignore:.*The number of training batches",  # its logging interval is longer than this run
)
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: f"{_framework(snippet)}-{SNIPPETS.index(snippet)}")
def test_snippet(snippet: str, in_run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if _framework(snippet) != "torch":
        pytest.importorskip(_framework(snippet))
    torch.manual_seed(0)

    names = _names(_framework(snippet))
    exec(compile(snippet, "README.md", "exec"), names)

    printed = capsys.readouterr().out
    assert "print(" not in snippet or printed
    for path in in_run_directory.rglob("curvature.jsonl"):
        assert not any(record.failed for record in read_records(path))
    if isinstance(names.get("monitor"), CurvatureMonitor):
        assert names["monitor"].history
    if names.get("trainer") is not None:
        assert len(list(in_run_directory.rglob("curvature.jsonl"))) == 2


def test_tags_are_those_of_the_docstrings() -> None:
    lightning = pytest.importorskip("curvature_callbacks.lightning")
    eigenvalues = (TopEigenpairs, SpectralDensity, EdgeRatio)
    classes = (FisherSpectrum, *eigenvalues, KFACCoverage, KFACQuality, GradientNoise, lightning.CurvatureCallback)
    documented = "".join(cls.__doc__ or "" for cls in classes)
    table = re.search(r"## Tags\n(.*?)\n## ", README, flags=re.DOTALL)
    assert table is not None
    of_prose = {"curvature/errors", "curvature/hessian_<metric>"}  # a text, and what the per-block tags stand in for
    assert _tags(table.group(1)) - of_prose == _tags(documented) - of_prose


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert target.startswith("https://") or (ROOT / target).is_file()


def _tags(text: str) -> set[str]:
    return set(re.findall(r"`(curvature[^`\s]*/[^`\s]+)`", text))


def _names(framework: str) -> dict[str, Any]:
    """What a snippet takes for granted: the user's model, data and training step."""
    if framework == "lightning":
        return {"module": _lightning_module(), "train_loader": _loader()}
    if framework == "transformers":
        return _transformers_names()
    model = _classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_one_step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    inputs, targets = next(iter(_loader()))
    return {
        "model": model,
        "train_loader": _loader(),
        "inputs": inputs,
        "targets": targets,
        "train_one_step": train_one_step,
    }


def _classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def _loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    rows = TensorDataset(torch.randn(32, 4, generator=generator), torch.randint(3, (32,), generator=generator))
    return DataLoader(rows, batch_size=16)


def _lightning_module() -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = _classifier()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def _transformers_names() -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    config = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    rows = torch.randint(11, (16, 6))
    return {
        "model": GPT2LMHeadModel(config),
        "args": TrainingArguments(
            output_dir="run", max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        "train_dataset": [{"input_ids": row, "labels": row} for row in rows],
    }
