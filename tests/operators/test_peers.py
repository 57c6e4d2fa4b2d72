"""Products and eigenvalues against a second implementation: curvlinops, and SciPy's `eigsh` on its operators."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from curvature_callbacks import lanczos
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.hessian import HessianOperator
from tests.cases import CASES, VOCABULARY, pair_batch
from tests.reference import relative_error

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(find_spec("curvlinops") is None, reason="curvlinops is not installed: `make bench-eigen` does it"),
    # The import of curvlinops: linear_operator scripts a function.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

SIZE, LENGTH = 4, 6  # rows of every microbatch: curvlinops weighs batches by rows, and here all targets count
KINDS: dict[str, tuple[str, Callable[..., Operator], dict[str, Any]]] = {
    "hessian": ("HessianLinearOperator", HessianOperator, {}),
    "ggn": ("GGNLinearOperator", GGNOperator, {}),
    "empirical Fisher of tokens": ("EFLinearOperator", EmpiricalFisherOperator, {"sample_unit": "token"}),
}


class WrittenNorm(nn.LayerNorm):
    """PyTorch's norm in single operations.

    curvlinops takes the Hessian by `jvp` of `jacrev`, which for the fused norm's weight is wrong in PyTorch 2.13: by 0.1 of the
    largest entry for this GPT-2. `jvp` of `grad`, double backward and differences of the gradient all agree with ours.
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class Logits(nn.Module):
    """A language model as a classifier of the positions it predicts, for curvlinops."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for module in self.model.modules():
            if type(module) is nn.LayerNorm:
                module.__class__ = WrittenNorm

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits[:, :-1].flatten(0, 1)


@dataclass(frozen=True)
class Workload:
    """A model with its microbatches, and the same as curvlinops has it: inputs to logits of one row per target."""

    model: nn.Module
    microbatches: list[Any]
    loss: str | None
    classifier: nn.Module
    pairs: list[tuple[Tensor, Tensor]]


def of_pairs(name: str, shape: tuple[int, ...]) -> Workload:
    generator, model = torch.Generator().manual_seed(0), CASES[name].model()
    pairs = [pair_batch(SIZE, 0, generator, shape=shape) for _ in range(2)]
    return Workload(model, pairs, "cross_entropy", model, pairs)


def of_text() -> Workload:
    generator, model = torch.Generator().manual_seed(0), CASES["gpt2"].model()
    batches = [torch.randint(3, VOCABULARY, (SIZE, LENGTH), generator=generator) for _ in range(2)]
    microbatches = [{"input_ids": ids, "labels": ids} for ids in batches]
    return Workload(model, microbatches, None, Logits(model), [(ids, ids[:, 1:].flatten()) for ids in batches])


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp": lambda: of_pairs("mlp", (5,)),
    "convnet": lambda: of_pairs("convnet", (1, 6, 6)),
    "gpt2": of_text,
}
BLOCKS = {"mlp": ("2.",), "convnet": ("layer1.1", "fc"), "gpt2": ("transformer.h.1.ln_1", "transformer.h.1.attn")}


@contextmanager
def both(name: str, matrix: str, prefixes: tuple[str, ...] = ("",)) -> Iterator[tuple[Operator, Callable[[Tensor], Tensor]]]:
    """Our operator, and products (P, K) -> (P, K) of theirs, in the parameters with these prefixes."""
    import curvlinops

    workload, (theirs, ours, options) = WORKLOADS[name](), KINDS[matrix]
    named = zip(workload.model.named_parameters(), workload.classifier.parameters(), strict=True)
    chosen = {name: value for (name, _), value in named if name.startswith(prefixes)}
    peer = getattr(curvlinops, theirs)(
        workload.classifier, nn.CrossEntropyLoss(), list(chosen.values()), workload.pairs, check_deterministic=False
    )
    with offline_problem(workload.model, workload.microbatches, loss=workload.loss, params_filter=None) as problem:
        yield ours(problem.objective, problem.microbatches, list(chosen), **options), lambda V: peer @ V


@pytest.mark.parametrize("part", ["all", "block"])
@pytest.mark.parametrize("matrix", KINDS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_products_are_those_of_curvlinops(name: str, matrix: str, part: str):
    with both(name, matrix, BLOCKS[name] if part == "block" else ("",)) as (operator, products):
        V = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert relative_error(operator.matmat(V), products(V)) < 1e-10


@pytest.mark.parametrize("matrix", KINDS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_eigenvalues_are_those_of_scipy(name: str, matrix: str):
    """At both ends of the Hessian; the lower ends of the others are zero, many times over, where ARPACK does not converge."""
    with both(name, matrix) as (operator, products):
        P, which = operator.shape[0], "BE" if matrix == "hessian" else "LA"
        found = lanczos(operator, k=4, which=which, tol=1e-7, max_matvecs=P, seed=0)

        def product(v: np.ndarray) -> np.ndarray:
            return products(torch.as_tensor(v).reshape(-1, 1))[:, 0].detach().numpy()

        start = torch.randn(P, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
        theirs = LinearOperator((P, P), matvec=product, dtype=start.dtype)
        expected = eigsh(theirs, k=4, which=which, v0=start, tol=1e-7, return_eigenvectors=False)
    assert found.converged.all()
    assert relative_error(found.eigenvalues, torch.as_tensor(np.sort(expected)[::-1].copy())) < 1e-10
