"""The same numbers on a CUDA device as on the CPU."""

import copy

import pytest
import torch

from curvature_callbacks import compute_fisher_spectrum, compute_kfac_coverage, compute_spectrum
from tests.cases import CASES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "resnet"])
def test_numbers_agree_with_the_cpu(name: str):
    case = CASES[name]
    model, batches = case.model(torch.float32), case.microbatches((3, 1, 2))
    device = copy.deepcopy(model).cuda()
    spectra, there = (compute_fisher_spectrum(m, batches, loss=case.loss).full.eigenvalues for m in (model, device))
    assert torch.allclose(there, spectra, rtol=1e-4)
    pairs, far = (compute_spectrum(m, batches, loss=case.loss, k=2, tol=1e-4).eigenvalues for m in (model, device))
    assert torch.allclose(far, pairs, rtol=1e-3)
    shares = [compute_kfac_coverage(m, batches, loss=case.loss).gradient_energy for m in (model, device)]
    assert shares[1] == pytest.approx(shares[0], rel=1e-4)


def test_a_probe_leaves_the_device_generator_alone():
    case = CASES["gpt2"]
    model = case.model(torch.float32).cuda()
    before = torch.cuda.get_rng_state()
    compute_fisher_spectrum(model, case.microbatches((3,)), loss=case.loss)
    assert torch.equal(torch.cuda.get_rng_state(), before)
