"""Accuracy at a size where float32 sums over the parameters would show."""

import copy

import pytest
import torch

from curvature_callbacks import compute_fisher_spectrum


@pytest.mark.slow
def test_a_gpt2_of_four_million_parameters_in_float32():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 5000, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.randint(5000, (8, 64))
    spectra = compute_fisher_spectrum(model, {"input_ids": ids, "labels": ids})
    exact = copy.deepcopy(model).double()
    rows = []
    for row in ids.split(1):
        loss = exact(input_ids=row, labels=row).loss * 63
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(exact.parameters()))]))
    G = torch.stack(rows)  # (8, 4.5e6)
    truth = torch.linalg.eigvalsh(G @ G.T / 8).flip(0)
    assert spectra.full.num_params == G.shape[1] > 4_000_000
    assert ((spectra.full.eigenvalues - truth).abs() / truth[0]).max() < 1e-6
