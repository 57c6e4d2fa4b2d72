"""Operators over processes against dense float64 matrices that are written another way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from curvature_callbacks import spectral_density
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.linalg.gram_eigenpairs import eigenpairs_of_gram
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.operators.capabilities import eigenpairs, self_check
from curvature_callbacks.operators.replicated import ReplicatedDifferencesOperator, ReplicatedOperator, ShardedFisherOperator
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes.group import current_world
from tests.processes.ranks import Ranks
from tests.reference import dense_fisher, dense_ggn, dense_hessian, float64_copy, mean_loss, rows, sample_gradients, stacked

ROWS = ((4,), (1, 2), (3,), (2, 1))  # of the microbatches of each process


def language_model(dtype: torch.dtype) -> GPT2LMHeadModel:
    """With a head tied to the embedding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "n_positions": 6, "n_embd": 4, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model: GPT2LMHeadModel = GPT2LMHeadModel(GPT2Config(**sizes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def sentences(rank: int) -> list[dict[str, Tensor]]:
    """Rows with one to five targets, other numbers on every process."""
    generator = torch.Generator().manual_seed(rank)
    found = []
    for count in ROWS[rank]:
        tokens = torch.randint(7, (count, 6), generator=generator)
        labels = tokens.clone()
        for row in range(count):
            labels[row, 2 + (row + rank) % 4 :] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


@contextmanager
def problem_here(dtype: torch.dtype) -> Iterator[Problem]:
    model, world = language_model(dtype), current_world()
    with isolated(model, seed=0):
        yield Problem(model, sentences(world.rank), world=world)


def dense(operator: str, dtype: torch.dtype, names: tuple[str, ...] | None) -> Tensor:
    """Of all columns of the identity, put together from the parts of the processes."""
    with problem_here(dtype) as problem:
        found: Any = getattr(problem, operator)(names)
        assert isinstance(found, ReplicatedOperator)
        world, size = current_world(), found.local.shape[0]
        assert found.shape[0] <= -(-size // world.size), "a process holds its part of a vector"
        columns = torch.eye(size, dtype=problem.objective.dtype)[world.part(size)]
        return world.assembled(found.matmat(columns).T.contiguous(), size).T


def batches(size: int) -> list[dict[str, Tensor]]:
    return [batch for rank in range(size) for batch in sentences(rank)]


def logits_and_labels(size: int) -> Any:
    def targets(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for row in rows(batches(size)):
            logits, labels = model(**row).logits[0, :-1], row["labels"][0, 1:]
            for place in (labels != -100).nonzero()[:, 0]:
                yield logits[place], labels[place]

    return targets


def reference(operator: str, size: int, names: tuple[str, ...] | None) -> Tensor:
    model = float64_copy(language_model(torch.float64))
    chosen = list(names or dict(model.named_parameters()))
    if operator == "hessian":
        return dense_hessian(model, lambda one: mean_loss(one, batches(size), "causal"), chosen)
    if operator == "ggn":
        return dense_ggn(model, chosen, logits_and_labels(size), F.cross_entropy)
    return dense_fisher(stacked(sample_gradients(model, batches(size), "causal"), chosen))


IN_FLOAT32 = 3e-7  # GPT-2 computes its loss in float32, also in a model of float64
ALL_IN_FLOAT32 = 4e-6  # PyTorch's own second derivatives in one process were off by 3e-7 to 3e-6 at other values
BLOCK = ("transformer.h.0.attn.c_attn.weight", "transformer.ln_f.weight")


@pytest.mark.parametrize("operator", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, IN_FLOAT32), (torch.float32, ALL_IN_FLOAT32)], ids=["float64", "float32"]
)
def test_a_block_over_two_processes(operator: str, dtype: torch.dtype, tolerance: float, two_processes: Ranks) -> None:
    assert_dense(two_processes, operator, dtype, tolerance, BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["hessian", "ggn", "empirical_fisher"])
def test_all_parameters_over_two_processes(operator: str, two_processes: Ranks) -> None:
    assert_dense(two_processes, operator, torch.float64, IN_FLOAT32, None)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["hessian", "ggn", "empirical_fisher"])
def test_a_block_over_four_processes(operator: str, four_processes: Ranks) -> None:
    assert_dense(four_processes, operator, torch.float64, IN_FLOAT32, BLOCK)


def assert_dense(ranks: Ranks, operator: str, dtype: torch.dtype, tolerance: float, names: tuple[str, ...] | None) -> None:
    expected = reference(operator, ranks.size, names)
    first, *others = ranks(dense, operator, dtype, names)
    assert all(torch.equal(first, other) for other in others), "the same bits on all"
    assert (first - expected).abs().max() <= tolerance * expected.abs().max()


def eigenpairs_from_the_gram() -> tuple[list[float], list[float]]:
    with problem_here(torch.float64) as problem:
        whole = sum(problem.grams().grams.values())
        operator = problem.empirical_fisher()
        assert isinstance(operator, ShardedFisherOperator)
        assert isinstance(whole, Tensor)
        pairs = eigenpairs_of_gram(whole[operator.rows][:, operator.rows], operator, LanczosOptions(k=4))
        return pairs.eigenvalues.tolist(), pairs.residuals.tolist()


def test_eigenpairs_from_the_gram_of_all_rows(two_processes: Ranks) -> None:
    expected = torch.linalg.eigvalsh(reference("empirical_fisher", 2, None)).flip(0)[:4]
    for values, residuals in two_processes(eigenpairs_from_the_gram):
        assert torch.allclose(torch.tensor(values, dtype=torch.float64), expected, rtol=IN_FLOAT32)
        assert max(residuals) <= IN_FLOAT32 * expected[0]


def sampled() -> tuple[Tensor, Tensor]:
    """The sampled Fisher's trace by its products, and by its Gram, whose labels are the same."""
    with problem_here(torch.float64) as problem:
        operator = problem.sampled_fisher()
        world, size = current_world(), operator.local.shape[0] if isinstance(operator, ReplicatedOperator) else 0
        matrix = world.assembled(operator.matmat(torch.eye(size, dtype=torch.float64)[world.part(size)]).T.contiguous(), size)
        grams = problem.grams(FisherType(fisher="sampled")).grams
        return matrix, torch.stack([*grams.values()]).sum(0)


def test_labels_are_drawn_for_every_process_and_alike_for_operator_and_gram(two_processes: Ranks) -> None:
    for matrix, gram in two_processes(sampled):
        count = sum(map(sum, ROWS[:2]))
        values, expected = torch.linalg.eigvalsh(matrix).flip(0)[:count], torch.linalg.eigvalsh(gram).flip(0) / count
        assert torch.allclose(values, expected, rtol=1e-9, atol=1e-12 * expected[0].item())


def density() -> tuple[float, float, int]:
    with problem_here(torch.float64) as problem:
        found = spectral_density(problem.hessian(), num_probes=10, num_steps=20, seed=0).metrics()
        basis = Krylov(problem.hessian(), 10, seed=0).basis
        return found["trace"], found["trace_standard_error"], basis.shape[1]


@pytest.mark.slow
def test_density_and_what_a_process_holds_of_a_basis(two_processes: Ranks) -> None:
    H = reference("hessian", 2, None)
    for trace, error, held in two_processes(density):
        assert abs(trace - H.trace()) <= 4 * error
        assert held <= -(-len(H) // 2)


def inner_products() -> tuple[float, float]:
    with problem_here(torch.float64) as problem:
        operator = problem.hessian()
        products = InnerProducts(operator)
        vector = torch.arange(products.dimension(operator.shape[0]), dtype=torch.float64)
        part = products.part(vector)
        return products.dot(part, part).item(), torch.equal(products.assembled(part), vector)


def test_a_vector_lies_in_parts_that_make_it_up(two_processes: Ranks) -> None:
    size = sum(value.numel() for value in language_model(torch.float64).parameters())
    for squared, is_whole in two_processes(inner_products):
        assert squared == (size - 1) * size * (2 * size - 1) / 6
        assert is_whole


def pairs_of_differences() -> tuple[list[float], float, float]:
    with problem_here(torch.float64) as problem:
        operator = problem.finite_difference_hessian(BLOCK)
        assert isinstance(operator, ReplicatedDifferencesOperator)
        checked = self_check(operator, 0)
        assert checked.num_matvecs == 2
        pairs = eigenpairs(operator, LanczosOptions(k=4, which="BE", tol=1e-4, max_matvecs=60))
        return pairs.eigenvalues.tolist(), checked.error, pairs.product_error


def test_differences_over_two_processes_say_how_coarse_they_are(two_processes: Ranks) -> None:
    values = torch.linalg.eigvalsh(reference("hessian", 2, BLOCK)).flip(0)
    first, second = two_processes(pairs_of_differences)
    assert first == second, "the same bits on all"
    eigenvalues, checked, along_the_ends = first
    assert eigenvalues == pytest.approx(torch.cat([values[:2], values[-2:]]).tolist(), abs=1e-3 * values[0].item())
    assert 0 < checked < 1e-2
    assert 0 < along_the_ends < 1e-2
