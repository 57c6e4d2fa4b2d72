"""Records against dense Fisher blocks from single-row gradients; factors from hooks, independent of the capture."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, ProbeError, Problem, RefusedError
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.gram.capture.rules import LINEAR
from curvature_callbacks.gram.kronecker.factors import kronecker_factors
from curvature_callbacks.gram.kronecker.positions import MicrobatchUses
from curvature_callbacks.gram.uses.elementwise import BIAS
from curvature_callbacks.gram.uses.uses import EMBEDDING, Lookup, OuterProduct
from curvature_callbacks.linalg.kronecker import LayerKronecker
from curvature_callbacks.measurements.kfac_quality import KFACQuality
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.record import Record, metric_tag, scalar_tags, tag_segment
from tests.cases import CLASSES, in_general_position
from tests.reference import dense_fisher, sample_gradients, stacked

N, T, VOCABULARY = 6, 4, 7
LAYERS = {"0": ["0.weight"], "1": ["1.weight", "1.bias"], "4": ["4.weight", "4.bias"]}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(VOCABULARY, 5), nn.Linear(5, 4), nn.Tanh(), Mean(), nn.Linear(4, CLASSES))


def random_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (N, T), generator=generator), torch.randint(CLASSES, (N,), generator=generator)


def layers_by_hooks(
    model: nn.Sequential, sharing: Sharing, scale: Mapping[str, float] | None = None
) -> dict[str, LayerKronecker]:
    """What `ProbeGrams.kronecker` promises, from the inputs and outputs of modules."""
    x, y = random_batch()
    values = [x]
    for module in model:
        values.append(module(values[-1]))
    loss = F.cross_entropy(values[-1], y, reduction="sum")
    gradients = sample_gradients(model, [(x, y)], "pair")
    found = {}
    for name, members in LAYERS.items():
        gradient = torch.autograd.grad(loss, values[int(name) + 1], retain_graph=True)[0] * (scale or {}).get(name, 1.0)
        use: Any = OuterProduct(LINEAR, N, values[int(name)].detach()) if name != "0" else Lookup(N, x, None)
        uses = MicrobatchUses(passes=[[use.completed(gradient)]], counts=torch.ones(N))
        factors = kronecker_factors([uses], bias=len(members) > 1, sharing=sharing)
        assert factors is not None
        g = stacked(gradients, members) * (scale or {}).get(name, 1.0)
        bias = members[1] if len(members) > 1 else None
        found[members[0]] = LayerKronecker(
            factors=factors, gram=g @ g.T, weight=members[0], bias=bias, transposed=name == "0", normaliser=float(N)
        )
    return found


@contextmanager
def problem_with(layers: Mapping[str, LayerKronecker], asked: list[Any] | None = None) -> Iterator[Problem]:
    def kronecker(kind: FisherType, *, sharing: Sharing) -> Mapping[str, LayerKronecker]:
        if asked is not None:
            asked.append((sharing, kind))
        return layers

    model = in_general_position(small_network).double()
    with offline_problem(model, random_batch(), loss="cross_entropy", params_filter=None) as problem:
        problem.grams.kronecker = kronecker
        problem.grams.operations = {
            name: [EMBEDDING if name[0] == "0" else LINEAR if "weight" in name else BIAS]
            for name in problem.objective.parameters
        }
        yield problem


def records_of(layers: Mapping[str, LayerKronecker], **options: Any) -> dict[str | None, Record]:
    with problem_with(layers) as problem:
        records, state = KFACQuality(**options).measure(problem, None)
    assert state is None
    return {record.block: record for record in records}


def dense_matrices(layer: LayerKronecker, members: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """F, A x G and EKFAC in the order (d_out, d_in [+ 1]) of the factors."""
    gradients = sample_gradients(in_general_position(small_network).double(), [random_batch()], "pair")
    shapes = {name: p.shape for name, p in small_network().named_parameters()}
    weight = gradients[members[0]].reshape(N, *shapes[members[0]])
    if members[0] == "0.weight":
        weight = weight.mT  # rows of the table are inputs
    g = torch.cat([weight, *(gradients[name].reshape(N, -1, 1) for name in members[1:])], 2).flatten(1)
    A, G = layer.factors.A, layer.factors.G
    basis = A.basis if A.basis is not None else torch.eye(VOCABULARY, dtype=torch.float64)[:, A.axes]
    U = torch.kron(G.basis, basis)
    fisher = dense_fisher(g)
    product = U @ torch.diag(torch.kron(G.eigenvalues, A.eigenvalues)) @ U.T
    return fisher, product, U @ torch.diag((U.T @ fisher @ U).diagonal()) @ U.T


def expected_scalars(fisher: Tensor, product: Tensor, ekfac: Tensor) -> dict[str, float]:
    def cosine(X: Tensor) -> float:
        return float((fisher * X).sum() / (fisher.norm() * X.norm()))

    return {
        "kfac_cosine": cosine(product),
        "relative_error": float((fisher - product).norm() / fisher.norm()),
        "ekfac_cosine": cosine(ekfac),
        "ekfac_relative_error": float((fisher - ekfac).norm() / fisher.norm()),
    }


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_records_are_those_of_the_dense_matrices(sharing: Sharing):
    layers = layers_by_hooks(in_general_position(small_network).double(), sharing)
    records = records_of(layers, sharing=sharing)
    assert set(records) == {None, *LAYERS}
    parts = {name: dense_matrices(layers[members[0]], members) for name, members in LAYERS.items()}
    for name, dense in parts.items():
        scalars = records[name].scalars
        expected = expected_scalars(*dense) | {"fisher_norm": float(dense[0].norm())}
        assert {key: scalars[key] for key in expected} == pytest.approx(expected)
        spectrum = torch.linalg.eigvalsh(dense[1])
        assert scalars["product_lambda_max"] == pytest.approx(spectrum[-1].item())
        assert scalars["product_trace"] == pytest.approx(spectrum.sum().item())
        assert scalars["product_frobenius_norm"] == pytest.approx(dense[1].norm().item())
        assert records[name].arrays["product_eigenvalues"] == pytest.approx(spectrum.flip(0)[:10].tolist())
        assert scalars["ekfac_relative_error"] <= scalars["relative_error"]
        for factor in ("input", "output", "product"):
            assert scalars[f"{factor}_condition_number"] >= 1
            assert scalars[f"{factor}_effective_rank"] >= 1
    whole = records[None]
    block = [torch.block_diag(*(dense[i] for dense in parts.values())) for i in range(3)]
    assert {key: whole.scalars[key] for key in expected_scalars(*block)} == pytest.approx(expected_scalars(*block))
    lam = torch.linalg.eigvalsh(block[1]).flip(0)
    assert whole.arrays["product_eigenvalues"] == pytest.approx(lam[:10].tolist())
    assert whole.scalars["product_lambda_max"] == pytest.approx(lam[0].item())
    assert whole.scalars["product_trace"] == pytest.approx(lam.sum().item())


def test_k_eigenvalues_are_kept():
    layers = layers_by_hooks(in_general_position(small_network).double(), "expand")
    for record in records_of(layers, k=3).values():
        assert {name: len(values) for name, values in record.arrays.items()} == {
            "product_eigenvalues": 3,
            "corrected_eigenvalues": 3,
        }
        assert all(values == sorted(values, reverse=True) for values in record.arrays.values())


def test_scaling_a_layers_gradients_leaves_its_shape_but_not_its_weight():
    """Cosines and conditions stay; the whole model's cosine becomes that of the layer with all the Fisher."""
    model = in_general_position(small_network).double()
    plain = records_of(layers_by_hooks(model, "expand"))
    scaled = records_of(layers_by_hooks(model, "expand", {"4": 1e4}))
    for metric in ("kfac_cosine", "relative_error", "ekfac_cosine", "input_condition_number", "output_condition_number"):
        assert scaled["4"].scalars[metric] == pytest.approx(plain["4"].scalars[metric])
    assert scaled[None].scalars["kfac_cosine"] == pytest.approx(plain["4"].scalars["kfac_cosine"], rel=1e-3)
    assert scaled[None].scalars["kfac_cosine"] != pytest.approx(plain[None].scalars["kfac_cosine"], rel=1e-3)


def test_tags_and_metadata():
    records = records_of(layers_by_hooks(in_general_position(small_network).double(), "expand"))
    tags = scalar_tags(records.values())
    m = "kfac_empirical_expand"
    assert {f"curvature/{m}_{x}" for x in ("kfac_cosine", "relative_error", "ekfac_cosine")} <= set(tags)
    assert f"curvature_{m}/ekfac_relative_error" in tags
    for name in LAYERS:
        assert tags[metric_tag(records[name], "kfac_cosine")] == records[name].scalars["kfac_cosine"]
    errors = [records[name].scalars["relative_error"] for name in LAYERS]
    assert tags[f"curvature_{m}_over_blocks/relative_error_min"] == min(errors)
    assert tags[f"curvature_{m}_over_blocks/relative_error_median"] == sorted(errors)[1]
    metadata = records[None].metadata
    assert metadata["layers"] == LAYERS
    assert (metadata["fisher"], metadata["sample_unit"], metadata["sharing"]) == ("empirical", "sequence", "expand")
    assert (metadata["num_samples"], metadata["normaliser"]) == (N, N)
    assert metadata["uncovered"] == {}
    for record in records.values():
        assert Record.from_json(record.to_json()).to_json() == record.to_json()
        assert all(type(value) is float for value in record.scalars.values())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "kfac_empirical_expand"),
        ({"sharing": "reduce", "fisher": "exact"}, "kfac_exact_reduce"),
        ({"fisher": "sampled", "sample_unit": "token", "num_draws": 3, "num_targets": 2}, "kfac_sampled_token_expand"),
    ],
)
def test_the_fisher_asked_for_is_the_one_named(options: dict[str, Any], name: str):
    measurement = KFACQuality(**options)
    asked: list[Any] = []
    with problem_with(layers_by_hooks(in_general_position(small_network).double(), "expand"), asked) as problem:
        (first, *_), _ = measurement.measure(problem, None)
    assert first.measurement == measurement.name == name == tag_segment(name)
    ((sharing, kind),) = asked
    assert sharing == options.get("sharing", "expand")
    assert kind == FisherType(**{key: value for key, value in options.items() if key != "sharing"})
    for key, value in options.items():
        assert first.metadata[key] == value


def test_a_layer_without_gradient_is_nan_and_no_curve():
    layers = layers_by_hooks(in_general_position(small_network).double(), "expand", {"4": 0.0})
    records = records_of(layers)
    assert math.isnan(records["4"].scalars["kfac_cosine"])
    assert "product_lambda_max" not in records["4"].scalars
    assert 0 < records[None].scalars["kfac_cosine"] < 1
    tags = scalar_tags(records.values())
    drawn = {name for name in LAYERS if metric_tag(records[name], "kfac_cosine") in tags}
    assert drawn == LAYERS.keys() - {"4"}
    assert tags["curvature_kfac_empirical_expand_over_blocks/ekfac_cosine_min"] > 0


def test_a_gradient_that_is_not_finite_is_no_answer():
    layers = layers_by_hooks(in_general_position(small_network).double(), "expand")
    layers["4.weight"].gram[0, 0] = torch.nan
    with pytest.raises(ProbeError, match=re.escape("`4.weight`")):
        records_of(layers)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(RefusedError, match="KFACCoverage"):
        records_of({})


@pytest.mark.parametrize(
    ("name", "block"), [("h.0.attn.weight", "h.0.attn"), ("attn.in_proj_weight", "attn.in_proj_weight"), ("weight", "weight")]
)
def test_layers_are_named_by_their_module(name: str, block: str):
    (first, *_) = layers_by_hooks(in_general_position(small_network).double(), "expand").values()
    layer = replace(first, weight=name, bias=None)
    assert set(records_of({name: layer})) == {None, block}


@pytest.mark.parametrize(
    "options",
    [{"sharing": "both"}, {"fisher": "true"}, {"sample_unit": "word"}, {"k": 0}, {"num_draws": 2}, {"num_targets": 0}],
)
def test_options_are_checked(options: dict[str, Any]):
    with pytest.raises(ConfigurationError, match=f"`{next(iter(options))}`"):
        KFACQuality(**options)
