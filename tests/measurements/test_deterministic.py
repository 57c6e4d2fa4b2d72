"""Deterministic algorithms inside a probe, and the same bits in every process."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import ConfigurationError, compute_fisher_spectrum
from curvature_callbacks.isolation.model import deterministic_algorithms
from tests.cases import CASES, VOCABULARY
from tests.measurements.fisher_type_cases import TYPES, sample_losses


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_algorithms_inside_the_probe_only(before: bool):
    case, enabled = CASES["mlp"], []

    def noting(model: nn.Module, batch: Any) -> Tensor:
        enabled.append(torch.are_deterministic_algorithms_enabled())
        return sample_losses(model, batch)

    try:
        torch.use_deterministic_algorithms(before, warn_only=before)
        spectra = compute_fisher_spectrum(case.model(), case.microbatches(), loss=noting, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert enabled[-1]
    assert spectra.metadata["deterministic"]


def test_deterministic_algorithms_are_off_again_after_an_exception():
    case = CASES["mlp"]
    calls = []

    def failing(model: nn.Module, batch: Any) -> Tensor:
        calls.append(torch.are_deterministic_algorithms_enabled())
        losses = sample_losses(model, batch)
        if calls[-1]:  # no deterministic algorithm, on any device
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return losses

    with pytest.raises(RuntimeError, match="deterministic"):
        compute_fisher_spectrum(case.model(), case.microbatches(), loss=failing, deterministic=True)
    assert calls[-1]
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_must_be_told_before_the_process_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ConfigurationError, match="CUBLAS_WORKSPACE_CONFIG"), deterministic_algorithms(torch.device("cuda")):
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic_algorithms(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


SCRIPT = f"""
import hashlib, torch
from torch import nn
from curvature_callbacks import compute_fisher_spectrum
torch.set_num_threads(1)
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding({VOCABULARY}, 6), nn.Flatten(), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 3))
    batch = torch.randint({VOCABULARY}, (7, 4)), torch.randint(3, (7,))
plain = compute_fisher_spectrum(model, batch, loss="cross_entropy", seed=3)
numbers = [plain.metadata["certificate_error"]]
for spectrum in (plain.full, *plain.blocks.values()):
    numbers += spectrum.eigenvalues.tolist()
for fisher, unit in {TYPES[::2]}:
    draws = 3 if fisher == "sampled" else 1
    options = dict(fisher=fisher, sample_unit=unit, num_draws=draws, max_params_per_block=40, deterministic=True, seed=3)
    spectra = compute_fisher_spectrum(model, batch, loss="cross_entropy", **options)
    for spectrum in (spectra.full, *spectra.blocks.values()):
        numbers += spectrum.eigenvalues.tolist() + list(spectrum.metrics().values())
digest = hashlib.sha256(repr(numbers).encode()).hexdigest()
"""


def test_the_same_bits_in_every_process():
    results: dict[str, Any] = {}
    threads = torch.get_num_threads()
    try:
        exec(SCRIPT, results)
    finally:
        torch.set_num_threads(threads)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", f"{SCRIPT}\nprint(digest)"]
    digest = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    assert digest == results["digest"]
