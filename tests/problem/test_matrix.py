"""Every matrix by name, through `compute_spectrum` and `TopEigenpairs`, against dense float64 matrices."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import (
    ConfigurationError,
    CurvatureMonitor,
    EdgeRatio,
    LinearCombination,
    MatrixOperator,
    Operator,
    Problem,
    Record,
    RefusedError,
    SpectralDensity,
    TopEigenpairs,
    compute_spectrum,
)
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator
from curvature_callbacks.problem.matrix import MatrixChoice, OperatorName
from curvature_callbacks.record import scalar_tags
from tests.reference import dense_fisher, sample_gradients, stacked

D = torch.float64
SIZES = (4, 3, 5)


def network(dtype: torch.dtype = D) -> nn.Sequential:
    """60 parameters: two layers with Kronecker factors and a norm without."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4, bias=False)).to(dtype)


def microbatches(dtype: torch.dtype = D) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 5, generator=generator, dtype=D).to(dtype), torch.randint(4, (size,), generator=generator))
        for size in SIZES
    ]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Stepped once, at the same place, so that it has a preconditioner."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    inputs, targets = microbatches()[0]
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.zero_grad()
    return optimizer


def everything(model: nn.Module) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*microbatches(), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def of_parameters(
    function: Callable[[dict[str, Tensor]], Tensor], model: nn.Module
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The function of one flat vector, and where the model is."""
    named = {name: value.detach() for name, value in model.named_parameters()}
    shapes = [value.shape for value in named.values()]

    def flat(theta: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
        return function(dict(zip(named, parts, strict=True)))

    return flat, torch.cat([value.flatten() for value in named.values()])


def hessian_of(model: nn.Module) -> Tensor:
    inputs, targets = everything(model)

    def loss(named: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, named, (inputs,)), targets)

    return torch.autograd.functional.hessian(*of_parameters(loss, model))


def ggn_of(model: nn.Module) -> Tensor:
    inputs, _ = everything(model)
    J = torch.autograd.functional.jacobian(
        *of_parameters(lambda named: torch.func.functional_call(model, named, (inputs,)), model)
    )
    p = model(inputs).detach().softmax(-1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (N, C, C)
    return torch.einsum("ncp,ncd,ndq->pq", J, H, J) / len(p)


@cache
def truth(name: str) -> Tensor:
    """Dense, in the order of the model's parameters; of Kronecker factors without what they do not cover."""
    model = network()
    if name in ("hessian", "finite_difference_hessian"):
        return hessian_of(model)
    if name == "ggn":
        return ggn_of(model)
    if name == "empirical_fisher":
        return dense_fisher(stacked(sample_gradients(model, microbatches(), "pair")))
    if name == "preconditioned_hessian":
        v = torch.cat([adam_state["exp_avg_sq"].flatten() for adam_state in adam(model).state.values()])
        root = (0.1 * ((v / (1 - 0.999)) ** 0.5 + 1e-8)) ** -0.5
        return root[:, None] * hessian_of(model) * root
    raise AssertionError(name)


def ends(values: Tensor, k: int = 6) -> Tensor:
    values = values.sort(descending=True).values
    return torch.cat([values[: k - k // 2], values[len(values) - k // 2 :]])


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        ("hessian", 1e-9),
        ("ggn", 1e-9),
        ("empirical_fisher", 1e-9),
        ("preconditioned_hessian", 1e-9),
        ("finite_difference_hessian", 1e-5),
    ],
)
def test_eigenvalues_are_those_of_the_dense_matrix(name: Any, accuracy: float):
    model = network()
    optimizer = adam(model) if name == "preconditioned_hessian" else None
    found = compute_spectrum(
        model, microbatches(), operator=name, loss="cross_entropy", optimizer=optimizer, k=6, tol=1e-7, max_matvecs=150
    )
    values = torch.linalg.eigvalsh(truth(name))
    assert (found.eigenvalues - ends(values)).abs().max() <= accuracy * values.abs().max()
    assert found.is_psd == (name in ("ggn", "empirical_fisher"))
    assert found.reorth_mode == {"empirical_fisher": "gram"}.get(name, "partial")
    assert (found.product_error > 0) == (name == "finite_difference_hessian")


@pytest.mark.parametrize("unit", ["sequence", pytest.param("token", marks=pytest.mark.slow)])
def test_the_sampled_fisher_comes_to_the_ggn(unit: Any):
    """At one target a row; the mean over seeds of `<F, G>` and of the trace, each within four standard errors."""
    model, G = network(), truth("ggn")
    found = []
    for seed in range(15):
        options: Any = {"loss": "cross_entropy", "params_filter": None, "seed": seed}
        with offline_problem(model, microbatches(), **options) as problem:
            F_seed = problem.sampled_fisher(sample_unit=unit, num_draws=3).matmat(torch.eye(len(G), dtype=D))
        found.append(torch.stack([F_seed.trace(), (F_seed * G).sum()]))
    values = torch.stack(found)
    expected = torch.stack([G.trace(), (G * G).sum()])
    assert ((values.mean(0) - expected).abs() <= 4 * values.std(0) / len(values) ** 0.5).all()


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_pairs_are_those_of_the_dense_product(sharing: Any, corrected: bool):
    """One position a row: `A` and `G` are plain second moments of inputs and output gradients."""
    model = network()
    (inputs, targets), dense = everything(model), []
    hidden = model[:3](inputs).detach()
    logits = model[3](hidden).detach().requires_grad_()
    (b_last,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
    first = model[0](inputs).detach().requires_grad_()
    (b_first,) = torch.autograd.grad(F.cross_entropy(model[1:](first), targets, reduction="sum"), first)
    extended = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=D)], 1)
    for a, b in ((extended, b_first), (hidden, b_last)):
        A, G = a.T @ a / len(a), b.T @ b / len(b)
        if not corrected:
            dense.append(torch.linalg.eigvalsh(torch.kron(G, A)))
            continue
        U_A, U_G = torch.linalg.eigh(A).eigenvectors, torch.linalg.eigh(G).eigenvectors
        rotated = torch.einsum("ni,ij,no,op->npj", a, U_A, b, U_G)
        dense.append(rotated.square().mean(0).flatten())
    name: Any = "ekfac" if corrected else "kfac"
    options: Any = {"operator": name, "sharing": sharing, "loss": "cross_entropy", "which": "LA", "k": 5}
    found = compute_spectrum(model, microbatches(), **options)
    expected = torch.cat(dense).sort(descending=True).values[:5]
    assert torch.allclose(found.eigenvalues, expected, rtol=1e-6)
    assert found.reorth_mode == "kronecker"
    assert found.converged.all()


def measured(measurement: Any, optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam) -> list[Record]:
    model = network()
    options: Any = {"loss": "cross_entropy", "params_filter": None, "optimizer": optimizer(model)}
    with offline_problem(model, microbatches(), **options) as problem:
        records, _ = measurement.measure(problem, measurement.init(problem))
    return list(records)


@pytest.mark.parametrize("name", ["hessian", "ggn", "empirical_fisher", "preconditioned_hessian"])
def test_blocks_are_diagonal_blocks(name: Any):
    whole, *blocks = measured(TopEigenpairs(operator=name, k=2, which="BE", tol=1e-7, max_matvecs=60, per_block=True))
    matrix, start = truth(name), 0
    assert whole.scalars["lambda_max"] == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-8)
    assert [record.block for record in blocks] == ["0", "1", "3"]
    for record, size in zip(blocks, (30, 10, 20), strict=True):
        values = torch.linalg.eigvalsh(matrix[start : start + size, start : start + size])
        assert record.scalars["lambda_max"] == pytest.approx(values[-1].item(), rel=1e-8)
        assert record.scalars["lambda_min"] == pytest.approx(values[0].item(), abs=1e-8 * values[-1].item())
        assert record.metadata["num_params"] == size
        start += size


def test_blocks_without_kronecker_factors_are_absent():
    whole, *blocks = measured(TopEigenpairs(operator="kfac", k=1, which="LA", per_block=True))
    assert [record.block for record in blocks] == ["0", "3"]
    assert whole.metadata["uncovered"] == ["1.weight", "1.bias"]
    assert whole.metadata["num_params"] == 50
    assert whole.scalars["lambda_max"] == max(record.scalars["lambda_max"] for record in blocks)


def test_a_weight_without_its_bias_is_no_block_of_kronecker_factors():
    measurement = TopEigenpairs(operator="kfac", k=1, which="LA", per_block=True)
    options: Any = {"loss": "cross_entropy", "params_filter": None, "block_structure": "parameter"}
    with offline_problem(network(), microbatches(), **options) as problem:
        records, _ = measurement.measure(problem, None)
    assert [record.block for record in records] == [None, "3.weight"]


def test_a_density_of_differences_says_how_coarse_they_are():
    (record,) = measured(SpectralDensity(operator="finite_difference_hessian", num_probes=2, num_steps=5))
    assert 0 < record.scalars["product_error"] < 1e-3


def test_blocks_the_optimizer_does_not_move_are_absent():
    def of_the_head(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model[3].parameters(), lr=0.1)  # type: ignore[index]

    measurement = TopEigenpairs(operator="preconditioned_hessian", k=1, which="LA", tol=1e-7, max_matvecs=60, per_block=True)
    whole, *blocks = measured(measurement, of_the_head)
    assert [record.block for record in blocks] == ["3"]
    assert whole.metadata["num_params"] == 20
    assert whole.scalars["lambda_max"] == pytest.approx(torch.linalg.eigvalsh(truth("hessian")[40:, 40:])[-1].item(), rel=1e-8)


def test_what_the_matrix_is_made_of_stands_in_the_record():
    expected = {
        "hessian": {"operator": "hessian", "num_params": 60},
        "ggn": {"operator": "ggn", "num_targets": 12},
        "sampled_fisher": {
            "fisher": "sampled",
            "sample_unit": "sequence",
            "num_samples": 12,
            "num_targets": 12,
            "num_draws": 1,
        },
        "ekfac": {"fisher": "empirical", "sharing": "expand", "sample_unit": "sequence"},
    }
    for name, settings in expected.items():
        record = measured(TopEigenpairs(operator=name, k=1, which="LA"))[0]  # type: ignore[arg-type]
        assert settings.items() <= record.metadata.items()


def test_names_and_tags_are_all_different():
    kinds = [
        *(TopEigenpairs(operator=name, k=2, per_block=True) for name in get_args(OperatorName)),
        TopEigenpairs(operator="sampled_fisher", sample_unit="token", k=2),
        TopEigenpairs(operator="kfac", sharing="reduce", k=2),
        TopEigenpairs(operator="kfac", fisher="sampled", k=2),
        *(SpectralDensity(operator=name, num_probes=2, num_steps=3) for name in ("hessian", "ggn", "ekfac")),
    ]
    assert len({kind.name for kind in kinds}) == len(kinds)
    tags = [set(scalar_tags(measured(kind))) for kind in kinds]
    assert all(tags)
    assert sum(map(len, tags)) == len(set().union(*tags))
    assert "curvature/ggn_lambda_max" in tags[1]
    assert "curvature_ggn_lambda_max/00" in tags[1]
    assert "curvature/kfac_empirical_expand_eigenpairs_lambda_max" in tags[4]
    assert "curvature_finite_difference_hessian/product_error" in tags[7]


def damped_hessian(problem: Problem, names: tuple[str, ...] | None) -> Operator:
    return LinearCombination([(1.0, problem.hessian(names))], shift=0.5)


def test_a_function_makes_a_matrix_of_ones_own():
    model = network()
    watching = CurvatureMonitor(
        model,
        probes=microbatches(),
        loss="cross_entropy",
        measure=[TopEigenpairs(operator=damped_hessian, k=2, tol=1e-7, max_matvecs=60, per_block=True)],
    )
    whole, *blocks = watching.step(0)[1:]
    values = torch.linalg.eigvalsh(truth("hessian"))
    assert whole.measurement == "damped_hessian"
    assert whole.scalars["lambda_max"] == pytest.approx(values[-1].item() + 0.5)
    assert whole.scalars["lambda_min"] == pytest.approx(values[0].item() + 0.5)
    assert [record.block for record in blocks] == ["0", "1", "3"]


def no_operator(problem: Problem, names: tuple[str, ...] | None) -> Any:
    return torch.eye(3)


def skewed(problem: Problem, names: tuple[str, ...] | None) -> Operator:
    return MatrixOperator(torch.triu(torch.ones(60, 60, dtype=D)))


def test_a_function_that_gives_no_operator_or_an_unsymmetric_one_is_refused():
    with pytest.raises(ConfigurationError, match="'no_operator' must give an operator"):
        measured(TopEigenpairs(operator=no_operator))
    with pytest.raises(RefusedError, match="not symmetric"):
        measured(TopEigenpairs(operator=skewed))


# ------------------------------------------------------------------------------------------------------- misconfiguration


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"operator": "gauss"}, "`operator` must be one of 'hessian', 'ggn'"),
        ({"operator": 3}, "`operator` must be one of"),
        ({"sample_unit": "token"}, "`sample_unit`='token' has no meaning for `operator`='hessian'"),
        ({"operator": "ggn", "num_draws": 2}, "`num_draws`=2 has no meaning for `operator`='ggn'"),
        ({"operator": "empirical_fisher", "num_draws": 2}, "`num_draws`=2 has no meaning"),
        ({"operator": "kfac", "num_draws": 2}, "`num_draws`=2 needs `fisher`='sampled'"),
        ({"operator": "ggn", "fisher": "exact"}, "`fisher`='exact' has no meaning"),
        ({"operator": "sampled_fisher", "sharing": "reduce"}, "`sharing`='reduce' has no meaning"),
        ({"operator": "kfac", "sample_unit": "token"}, "`sample_unit`='token' has no meaning"),
        ({"operator": "kfac", "sharing": "mean"}, "`sharing` must be one of"),
        ({"operator": "sampled_fisher", "num_draws": 0}, "`num_draws` must be"),
    ],
)
@pytest.mark.parametrize("kind", [TopEigenpairs, SpectralDensity, MatrixChoice])
def test_bad_options_are_refused_at_once(kind: Any, options: Any, said: str):
    with pytest.raises(ConfigurationError, match=said):
        kind(**options)


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def row_losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("kind", [TopEigenpairs, SpectralDensity])
@pytest.mark.parametrize(
    ("options", "loss", "said"),
    [
        ({"operator": "empirical_fisher"}, mean_loss, "one loss per row"),
        ({"operator": "empirical_fisher", "sample_unit": "token"}, row_losses, "losses of single targets"),
        ({"operator": "sampled_fisher"}, row_losses, "likelihood of the loss"),
        ({"operator": "ggn"}, row_losses, "the GGN needs the logits"),
        ({"operator": "kfac", "fisher": "exact"}, row_losses, "likelihood of the loss"),
        ({"operator": "preconditioned_hessian"}, "cross_entropy", "needs the `optimizer`"),
    ],
)
def test_what_the_run_cannot_have_stops_it_before_its_first_step(kind: Any, options: Any, loss: Any, said: str):
    watching = CurvatureMonitor(network(), probes=microbatches(), loss=loss, measure=[kind(**options)])
    with pytest.raises(ConfigurationError, match=said):
        watching.check()


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_kronecker_factors_of_given_labels_need_the_mean_loss_only(name: Any):
    measure = [TopEigenpairs(operator=name, k=1, which="LA")]
    found = []
    for loss in (mean_loss, row_losses):
        watching = CurvatureMonitor(network(), probes=microbatches(), loss=loss, measure=measure)
        watching.check()
        found.append(watching.step(0)[1].scalars["lambda_max"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("loss", [mean_loss, row_losses])
@pytest.mark.parametrize("name", ["hessian", "finite_difference_hessian"])
def test_a_hessian_asks_nothing_of_the_loss(name: Any, loss: Any):
    watching = CurvatureMonitor(network(), probes=microbatches(), loss=loss, measure=[TopEigenpairs(operator=name, k=1)])
    watching.check()
    assert watching.step(0)[1].scalars["lambda_max"] == pytest.approx(
        torch.linalg.eigvalsh(truth("hessian"))[-1].item(), rel=1e-3
    )


def test_before_the_first_step_of_adam_there_is_a_reason_and_no_number():
    for kind in (TopEigenpairs, SpectralDensity):
        (record,) = measured(kind(operator="preconditioned_hessian"), lambda model: torch.optim.Adam(model.parameters()))
        assert not record.scalars
        assert "no step yet" in record.metadata["reason"]
        assert not record.failed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["BE", "SA", "LM"])
def test_differences_in_sixteen_bits_say_nothing_about_negative_curvature(which: Any, dtype: torch.dtype):
    options: Any = {"operator": "finite_difference_hessian", "loss": "cross_entropy", "k": 2}
    with pytest.raises(ConfigurationError, match=r"bfloat16 or float16.*`which`='LA'"):
        compute_spectrum(network(dtype), microbatches(dtype), which=which, **options)
    measurement = TopEigenpairs(operator="finite_difference_hessian", which=which)
    with pytest.raises(ConfigurationError, match="bfloat16 or float16"):
        CurvatureMonitor(network(dtype), probes=microbatches(dtype), loss="cross_entropy", measure=[measurement]).check()
    top = compute_spectrum(network(dtype), microbatches(dtype), which="LA", **options)
    assert "most_negative_eigenvalue" not in top.metrics()


def test_kinks_are_not_taken_for_curvature():
    """A staircase: its gradient jumps within every step."""

    class Staircase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=D))

        def forward(self, x: Tensor) -> Tensor:
            return ((self.w * x * 1e5) % 1.0 - 0.5).abs() / 1e5

    batch = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=D) + 0.5, torch.zeros(6, 8, dtype=D)

    def loss(model: nn.Module, rows: Any) -> Tensor:
        return model(rows[0]).sum(1)

    with pytest.raises(RefusedError, match="kinks"):
        compute_spectrum(Staircase(), batch, operator="finite_difference_hessian", loss=loss, k=2)


def test_the_error_of_the_differences_stands_in_the_record_and_bounds_the_error():
    record = measured(TopEigenpairs(operator="finite_difference_hessian", k=2, tol=1e-6, max_matvecs=60))[0]
    exact = torch.linalg.eigvalsh(truth("hessian"))[-1].item()
    assert 0 < record.scalars["product_error"] < 1e-3
    assert abs(record.scalars["lambda_max"] - exact) <= record.scalars["product_error"] * abs(exact) + 1e-9


@pytest.mark.parametrize("mode", ["full", "partial", "selective", "off", "thick_restart"])
def test_the_mode_asked_for_is_the_one_that_runs(mode: Any):
    found = compute_spectrum(network(), microbatches(), loss="cross_entropy", k=2, reorth_mode=mode, which="LA")
    assert found.reorth_mode == mode
    assert found.eigenvalues[0].item() == pytest.approx(torch.linalg.eigvalsh(truth("hessian"))[-1].item(), rel=1e-5)
    record = measured(TopEigenpairs(k=2, reorth_mode=mode))[0]
    assert record.metadata["reorth_mode"] == mode


def test_fisher_types_name_the_samples():
    assert MatrixChoice(operator="sampled_fisher", sample_unit="token", num_draws=3).fisher_type == FisherType(
        fisher="sampled", sample_unit="token", num_draws=3
    )
    assert MatrixChoice(operator="kfac", fisher="exact").fisher_type == FisherType(fisher="exact")


# ------------------------------------------------------------------------------------------- options reach what they are about


def lambda_max(matrix: Tensor) -> float:
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1].item()


def test_draws_and_samples_asked_for_are_those_of_the_matrix():
    model = network()
    options: Any = {"loss": "cross_entropy", "params_filter": None, "seed": 3}
    with offline_problem(model, microbatches(), **options) as problem:
        eye = torch.eye(60, dtype=D)
        for num_draws in (1, 4):
            asked: Any = {"sample_unit": "token", "num_draws": num_draws}
            measurement = TopEigenpairs(operator="sampled_fisher", k=1, which="LA", tol=1e-8, max_matvecs=60, **asked)
            ((record,), _) = measurement.measure(problem, None)
            expected = lambda_max(problem.sampled_fisher(**asked).matmat(eye))
            assert record.scalars["lambda_max"] == pytest.approx(expected, rel=1e-8)
            assert asked.items() <= record.metadata.items()


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_kronecker_factors_are_those_of_the_fisher_asked_for(fisher: Any):
    with offline_problem(network(), microbatches(), loss="cross_entropy", params_filter=None) as problem:
        ((record,), _) = TopEigenpairs(operator="kfac", fisher=fisher, k=1, which="LA").measure(problem, None)
        operator = problem.kfac(kind=FisherType(fisher=fisher), sharing="expand", corrected=False)
        expected = lambda_max(operator.matmat(torch.eye(50, dtype=D)))
    assert record.scalars["lambda_max"] == pytest.approx(expected, rel=1e-8)


def test_a_row_without_a_finite_gradient_is_no_part_of_the_gram():
    batches = microbatches()
    batches[1][0][1] = torch.nan  # the sixth row of twelve
    found = compute_spectrum(network(), batches, operator="empirical_fisher", loss="cross_entropy", k=3, which="LA")
    kept = torch.arange(3) != 1
    others = [batches[0], (batches[1][0][kept], batches[1][1][kept]), batches[2]]
    values = torch.linalg.eigvalsh(dense_fisher(stacked(sample_gradients(network(), others, "pair"))))
    assert found.reorth_mode == "gram"
    assert torch.allclose(found.eigenvalues, values.flip(0)[:3], rtol=1e-9)


def test_factors_need_no_vector_to_start_from():
    with offline_problem(network(), microbatches(), loss="cross_entropy", params_filter=None) as problem:
        state = TopEigenpairs(operator="kfac", k=2, which="LA", per_block=True).measure(problem, None)[1]
    assert state is not None
    assert state["starts"] == {}


def test_a_function_without_a_name_is_refused():
    with pytest.raises(ConfigurationError, match="a function with a name"):
        TopEigenpairs(operator=partial(damped_hessian))


def test_the_error_of_the_differences_is_that_of_the_worse_end(monkeypatch: pytest.MonkeyPatch):
    estimates = iter([0.0, 0.02, 0.05])  # of the self-check, the largest and the smallest
    monkeypatch.setattr(FiniteDifferenceHessianOperator, "error_estimate", lambda self, v: next(estimates))
    found = compute_spectrum(network(), microbatches(), operator="finite_difference_hessian", loss="cross_entropy", k=2)
    assert found.product_error == 0.05


def test_products_spent_on_the_error_of_the_differences_count(monkeypatch: pytest.MonkeyPatch):
    made: list[float] = []
    right = FiniteDifferenceHessianOperator._product

    def counted(self: FiniteDifferenceHessianOperator, v: Tensor, multiple: float = 1.0) -> Tensor:
        made.append(multiple)
        return right(self, v, multiple)

    monkeypatch.setattr(FiniteDifferenceHessianOperator, "_product", counted)
    found = compute_spectrum(network(), microbatches(), operator="finite_difference_hessian", loss="cross_entropy", k=2)
    assert found.num_matvecs == len(made) - 2  # those of the self-check are not the result's
    assert made.count(2.0) == 3
    assert found.eigenvectors is None  # which were not asked for


class Square(torch.autograd.Function):
    """Taken as linear by a second backward pass. At the end of a model its Hessian stays symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0] * ctx.saved_tensors[0].detach()


def fused(model: nn.Module, batch: Any) -> Tensor:
    return Square.apply(model(batch[0])).sum(1)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", [TopEigenpairs, SpectralDensity])
def test_the_hessian_between_preconditioners_is_checked_like_any_other(kind: Any):
    model = network()
    options: Any = {"loss": fused, "params_filter": None, "optimizer": adam(model)}
    with offline_problem(model, microbatches(), **options) as problem, pytest.raises(RefusedError, match="finite differences"):
        kind(operator="preconditioned_hessian").measure(problem, None)


@pytest.mark.parametrize(
    ("measurement", "state"),
    [
        (TopEigenpairs(k=1), {"error": 0.25, "starts": {}}),
        (SpectralDensity(num_probes=2, num_steps=2, deflate=0), 0.25),
        (EdgeRatio(), (0.25, None)),
    ],
    ids=["pairs", "density", "edge"],
)
def test_what_the_first_self_check_found_stands_in_every_later_record(measurement: Any, state: Any):
    model = network()
    options: Any = {"loss": "cross_entropy", "params_filter": None, "optimizer": adam(model)}
    with offline_problem(model, microbatches(), **options) as problem:
        ((record,), _) = measurement.measure(problem, state)
    assert record.metadata["asymmetry"] == 0.25


@pytest.mark.parametrize(
    ("kind", "state"),
    [(TopEigenpairs, {"error": 0.25, "starts": {"": torch.ones(60, dtype=D)}}), (SpectralDensity, 0.25)],
)
def test_a_probe_without_a_preconditioner_keeps_what_earlier_ones_found(kind: Any, state: Any):
    model = network()
    options: Any = {"loss": "cross_entropy", "params_filter": None, "optimizer": torch.optim.Adam(model.parameters())}
    with offline_problem(model, microbatches(), **options) as problem:
        ((record,), after) = kind(operator="preconditioned_hessian").measure(problem, state)
    assert "no step yet" in record.metadata["reason"]
    assert after is state


def test_a_density_of_differences_in_sixteen_bits_is_refused_before_the_first_step():
    measurement = SpectralDensity(operator="finite_difference_hessian")
    watching = CurvatureMonitor(
        network(torch.bfloat16), probes=microbatches(torch.bfloat16), loss="cross_entropy", measure=[measurement]
    )
    with pytest.raises(ConfigurationError, match="bfloat16 or float16"):
        watching.check()
