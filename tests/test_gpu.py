"""The same numbers on a CUDA device as on the CPU."""

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import (
    ConfigurationError,
    CurvatureMonitor,
    FisherSpectrum,
    GradientNoise,
    KFACQuality,
    MatrixOperator,
    SpectralDensity,
    TopEigenpairs,
    compute_fisher_spectrum,
    compute_kfac_coverage,
    compute_spectrum,
    lanczos,
)
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.gram.block_grams import block_grams
from curvature_callbacks.gram.context import GramContext, GramOptions
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.gram.storage import MemoryBudget
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.graphs import GraphLimits
from tests.cases import CASES, Case
from tests.training_cases import assert_equal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_both(case: Case) -> tuple[nn.Module, nn.Module]:
    model = case.model(torch.float32)
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "resnet", "convnet", "mixtral"])
def test_numbers_agree_with_the_cpu(name: str):
    case = CASES[name]
    batches = case.microbatches((3, 1, 2))
    model, device = on_both(case)
    spectra, there = (compute_fisher_spectrum(m, batches, loss=case.loss).full.eigenvalues for m in (model, device))
    assert torch.allclose(there, spectra, rtol=1e-4, atol=1e-6 * spectra[0].item())
    pairs, far = (compute_spectrum(m, batches, loss=case.loss, k=2, tol=1e-4).eigenvalues for m in (model, device))
    assert torch.allclose(far, pairs, rtol=1e-3)
    shares = [compute_kfac_coverage(m, batches, loss=case.loss).gradient_energy for m in (model, device)]
    assert shares[1] == pytest.approx(shares[0], rel=1e-4)


TYPES: dict[str, dict[str, Any]] = {
    "sampled": {"fisher": "sampled", "num_draws": 2},
    "exact": {"fisher": "exact"},
    "token": {"sample_unit": "token", "num_targets": 2},
    "sampled token": {"fisher": "sampled", "sample_unit": "token", "num_targets": 2},
    "centred": {"center_gradients": True},
    "a part": {"max_params_per_block": 50},
    "clipped": {"max_sample_grad_norm": 1.0},
}


@pytest.mark.parametrize("options", TYPES.values(), ids=TYPES.keys())
@pytest.mark.parametrize("name", ["gpt2", "convnet"])
def test_every_type_of_fisher_draws_the_same_and_finds_the_same(name: str, options: dict[str, Any]):
    case = CASES[name]
    batches = case.microbatches((3, 1, 2))
    found, there = (compute_fisher_spectrum(m, batches, loss=case.loss, **options) for m in on_both(case))
    assert there.metadata["num_gradients"] == found.metadata["num_gradients"]
    assert there.metadata["fallback"].keys() == found.metadata["fallback"].keys()
    for block, spectrum in found.blocks.items():
        largest = spectrum.eigenvalues[0].item()
        assert there.blocks[block].eigenvalues[0].item() == pytest.approx(largest, rel=1e-4), block
        assert there.blocks[block].eigenvalues.sum().item() == pytest.approx(spectrum.eigenvalues.sum().item(), rel=1e-4), block


def grams(model: nn.Module, case: Case, budget: MemoryBudget | None = None, **options: Any) -> BlockGrams:
    with offline_problem(model, case.microbatches((3, 1, 2)), loss=case.loss, params_filter=None) as found:
        context = GramContext(objective=found.objective, memory=GramMemory(), seed=0)
        return block_grams(context, found.microbatches, found.blocks, GramOptions(budget=budget, **options))


MODES = {
    "factors on device": MemoryBudget(device_bytes=1 << 30),
    "factors on host": MemoryBudget(device_bytes=0, host_bytes=1 << 30),
    "block groups": MemoryBudget(device_bytes=8 << 10),
}


@pytest.mark.parametrize("mode", MODES)
def test_factors_may_wait_anywhere(mode: str):
    case = CASES["gpt2"]
    model, device = on_both(case)
    expected, found = grams(model, case).grams, grams(device, case, MODES[mode])
    assert found.mode.endswith(mode)
    scale = max(K.abs().max().item() for K in expected.values())
    for block, K in found.grams.items():
        assert K.device.type == "cuda"
        assert (K.cpu() - expected[block]).abs().max().item() < 1e-5 * scale, block


@pytest.mark.parametrize("kind", [FisherType(), FisherType(fisher="sampled")], ids=["empirical", "sampled"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["gpt2", "convnet"])
def test_kronecker_factors_agree_with_the_cpu(name: str, sharing: Any, kind: FisherType):
    case = CASES[name]
    found, there = (grams(m, case, fisher_type=kind, sharing=sharing).kronecker for m in on_both(case))
    assert there.keys() == found.keys() != set()
    for weight, layer in found.items():
        for mine, other in ((layer.factors.A, there[weight].factors.A), (layer.factors.G, there[weight].factors.G)):
            assert_close_spectra(other.eigenvalues, mine.eigenvalues)


def assert_close_spectra(found: Tensor, expected: Tensor):
    """Where a factor is zero but for rounding, as that of a key's output gradients, its sum is compared with nothing."""
    assert found.sum().item() == pytest.approx(expected.sum().item(), rel=1e-3, abs=1e-8)


def test_the_fisher_has_the_eigenpairs_of_its_gram():
    case = CASES["bert"]
    model = case.model(torch.float32).cuda()
    options: dict[str, Any] = {"loss": case.loss, "k": 3, "which": "LA", "return_eigenvectors": True}
    pairs = compute_spectrum(model, case.microbatches((3, 1, 2)), operator="empirical_fisher", **options)
    spectrum = compute_fisher_spectrum(model, case.microbatches((3, 1, 2)), loss=case.loss).full.eigenvalues
    assert torch.allclose(pairs.eigenvalues.cpu().double(), spectrum[:3], rtol=1e-4)
    assert pairs.converged.all()


@pytest.mark.parametrize(
    "operator", ["ggn", "empirical_fisher", "sampled_fisher", "kfac", "ekfac", "finite_difference_hessian"]
)
@pytest.mark.parametrize("name", ["gpt2", "convnet"])
def test_every_matrix_has_the_eigenvalues_of_the_cpu(name: str, operator: Any):
    case = CASES[name]
    options: dict[str, Any] = {"loss": case.loss, "operator": operator, "k": 2, "which": "LA", "tol": 1e-4}
    pairs, far = (compute_spectrum(m, case.microbatches((3, 1, 2)), **options) for m in on_both(case))
    rtol = 2e-2 if operator == "finite_difference_hessian" else 1e-3
    assert far.converged.all()
    assert torch.allclose(far.eigenvalues, pairs.eigenvalues, rtol=rtol)


@pytest.mark.parametrize("mode", ["full", "partial", "selective", "off", "thick_restart"])
def test_every_mode_of_lanczos_agrees_with_a_dense_matrix(mode: Any):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(300, 300, generator=generator)
    A = (A + A.T) / 2
    pairs = lanczos(MatrixOperator(A.cuda()), k=6, which="BE", tol=1e-3, max_matvecs=250, reorth_mode=mode)
    values = torch.linalg.eigvalsh(A.double()).flip(0)
    wanted = torch.cat([values[:3], values[-3:]])
    assert ((pairs.eigenvalues - wanted).abs() <= 2e-5 * values.abs().max())[pairs.converged].all()
    assert pairs.converged.sum() >= 4


def test_graphs_that_do_not_fit_are_built_again_for_the_same_products():
    case = CASES["gpt2"]
    _, model = on_both(case)
    with offline_problem(model, case.microbatches((3, 1, 2)), loss=case.loss, params_filter=None) as problem:
        kept = GGNOperator(problem.objective, problem.microbatches)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GGNOperator, "limits", GraphLimits(kept_bytes=0))
            rebuilt = GGNOperator(problem.objective, problem.microbatches)
        calls: list[int] = []
        problem.model.register_forward_hook(lambda *_: calls.append(1))
        v = torch.randn(kept.shape[0], 2, generator=torch.Generator().manual_seed(0)).cuda()
        expected = kept.matmat(v)
        assert not calls
        assert torch.allclose(rebuilt.matmat(v), expected, rtol=1e-4, atol=1e-6)
        assert len(calls) == 3


def test_deterministic_gives_the_same_bits_or_says_what_it_needs():
    case = CASES["gpt2"]
    model = case.model(torch.float32).cuda()

    def spectrum() -> Tensor:
        return compute_fisher_spectrum(model, case.microbatches((3, 1, 2)), loss=case.loss, deterministic=True).full.eigenvalues

    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        with pytest.raises(ConfigurationError, match="CUBLAS_WORKSPACE_CONFIG"):
            spectrum()
    else:
        assert_equal(spectrum(), spectrum())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_monitor_measures_everything():
    case = CASES["convnet"]
    measure = [
        FisherSpectrum(),
        FisherSpectrum(fisher="exact"),
        KFACQuality(),
        GradientNoise(),
        TopEigenpairs(operator="empirical_fisher", per_block=True),
        TopEigenpairs(operator="ggn", k=1, which="LA", tol=1e-4, max_matvecs=60),
        SpectralDensity(operator="ggn", num_probes=2, num_steps=20),
    ]
    batches = case.microbatches((3, 1, 2))
    records = [CurvatureMonitor(m, probes=batches, loss=case.loss, measure=measure).step(0) for m in on_both(case)]
    for found, there in zip(*records, strict=True):
        assert there.error is None
        assert (there.measurement, there.block) == (found.measurement, found.block)
        for metric in ("lambda_max", "full_lambda_max", "full_trace", "covariance_trace", "kfac_cosine"):
            if metric in found.scalars:
                assert there.scalars[metric] == pytest.approx(found.scalars[metric], rel=1e-3, nan_ok=True), metric


def test_a_probe_leaves_the_device_generator_alone():
    case = CASES["gpt2"]
    model = case.model(torch.float32).cuda()
    before = torch.cuda.get_rng_state()
    compute_fisher_spectrum(model, case.microbatches((3,)), loss=case.loss, fisher="sampled")
    assert torch.equal(torch.cuda.get_rng_state(), before)
