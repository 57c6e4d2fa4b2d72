"""Settings that tests and doctests share; set before transformers is imported anywhere."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that tests start import this checkout too, wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Results must not depend on how many cores are free."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def empty_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests find as their working directory."""
    return tmp_path_factory.mktemp("working_directory")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(empty_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that writes to the working directory, which is a user's checkout otherwise: `tmp_path` is for that."""
    monkeypatch.chdir(empty_directory)
    yield
    left = sorted(empty_directory.iterdir())
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not left, f"left in the working directory: {', '.join(path.name for path in left)}; write to `tmp_path` instead."
