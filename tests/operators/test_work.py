"""What a product touches: the named leaves and no others, and memory for a few buffers as large as the logits, not a matrix."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvature_callbacks import Problem
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator, SampledFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.hessian import HessianOperator
from tests.cases import CASES, causal_batch, in_general_position
from tests.families import family
from tests.reference import float64_copy, relative_error

OPERATORS = (HessianOperator, GGNOperator, EmpiricalFisherOperator, SampledFisherOperator, FiniteDifferenceHessianOperator)
FISHERS = (EmpiricalFisherOperator, SampledFisherOperator)


class Watch(TorchDispatchMode):
    """What every operation on tensors allocates.

    Attributes:
        largest: elements of the largest tensor that an operation gave.
        most: buffers of at least `size` elements, new since the start, that were alive at once.
        calls: operations by name.
    """

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.largest, self.most, self.calls = 0, 0, Counter[str]()
        self._size, self._alive = size, dict[int, StorageWeakRef]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket._qualified_op_name] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, given)
        self._alive = {key: one for key, one in self._alive.items() if not one.expired()}
        self.most = max(self.most, len(self._alive))
        return result

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        elements = storage.nbytes() // tensor.element_size()
        self.largest = max(self.largest, elements)
        if storage._cdata not in given and elements >= self._size:
            self._alive[storage._cdata] = StorageWeakRef(storage)


def test_the_watch_sees_what_is_alive():
    x = torch.ones(10, 10)
    with Watch(100) as watch:
        y = x + 1  # one
        y.mul_(2).view(100)  # still one
        for _ in range(3):
            z = x @ y  # two; from the second round on the old one lives until the new one is there
        del y, z
        x.sum() + 1
        torch.ones(5, 50)
    assert (watch.most, watch.largest) == (3, 250)
    assert watch.calls["aten::mm"] == 3


@contextmanager
def mlp_problem() -> Iterator[Problem]:
    case = CASES["mlp"]
    with offline_problem(case.model(), case.microbatches(), loss=case.loss, params_filter=None) as problem:
        yield problem


LAST, FIRST = ("4.weight", "4.bias"), ("0.weight", "0.bias")


@pytest.mark.parametrize("cls", OPERATORS)
@pytest.mark.parametrize("names", [LAST, FIRST, ("2.bias",)])
def test_only_the_named_leaves_are_differentiated(cls: type, names: tuple[str, ...]):
    """In the forward pass nothing else asks for a gradient, and in the graph nothing else takes one."""
    with mlp_problem() as problem:
        seen: list[set[str]] = []
        look = lambda model, _: seen.append({name for name, p in model.named_parameters() if p.requires_grad})  # noqa: E731
        handle = problem.model.register_forward_pre_hook(look)
        operator = cls(problem.objective, problem.microbatches, names)
        operator.matmat(torch.ones(operator.shape[0], 1, dtype=torch.float64))
        handle.remove()
        assert seen
        assert all(found == set(names) for found in seen)
        assert operator.shape[0] == sum(problem.objective.parameters[name].numel() for name in names)
        assert all(parameter.grad is None for parameter in problem.model.parameters())


@pytest.mark.parametrize(("cls", "fewer"), [(HessianOperator, 7), (GGNOperator, 4), *((cls, 4) for cls in FISHERS)])
def test_layers_before_the_block_are_not_passed_through(cls: type, fewer: int):
    """Matrix products of one product with the last of three layers, a microbatch, against those with all."""
    with mlp_problem() as problem:
        counts = {}
        for names in (None, LAST):
            operator = cls(problem.objective, problem.microbatches, names)
            with Watch() as watch:
                operator.matmat(torch.ones(operator.shape[0], 1, dtype=torch.float64))
            counts[names] = sum(watch.calls[name] for name in ("aten::mm", "aten::addmm", "aten::addmm_"))
        assert counts[LAST] > 0
        assert counts[None] >= fewer * counts[LAST]


WIDE = 400  # classes: the logits are larger than every parameter and activation
LENGTH = 12


@contextmanager
def language_problem() -> Iterator[Problem]:
    model = in_general_position(lambda: family("gpt2", vocab_size=WIDE)).double()
    batch = causal_batch(3, LENGTH, torch.Generator().manual_seed(0))
    with offline_problem(model, [batch], loss=None, params_filter=None) as problem:
        yield problem


@pytest.mark.parametrize(
    ("cls", "options", "buffers"),
    [
        (GGNOperator, {}, 3),
        (EmpiricalFisherOperator, {"sample_unit": "sequence"}, 3),
        (EmpiricalFisherOperator, {"sample_unit": "token"}, 3),
        (SampledFisherOperator, {"sample_unit": "sequence", "num_draws": 3}, 3),
        (SampledFisherOperator, {"sample_unit": "token", "num_draws": 3}, 3),
    ],
)
def test_a_product_takes_few_buffers_of_the_size_of_the_logits(cls: type, options: dict[str, Any], buffers: int):
    """And nothing larger: neither the Jacobian of logits, nor that of losses, nor one gradient for every row."""
    with language_problem() as problem:
        P = sum(parameter.numel() for parameter in problem.objective.parameters.values())
        logits = 3 * LENGTH * WIDE
        assert max(parameter.numel() for parameter in problem.objective.parameters.values()) < P < logits
        with Watch(logits) as built:
            operator = cls(problem.objective, problem.microbatches, **options)
        V = torch.ones(P, 2, dtype=torch.float64)
        with Watch(logits) as watch:
            operator.matmat(V)
        assert built.largest == watch.largest == logits
        assert 1 <= watch.most <= buffers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", OPERATORS)
def test_narrow_models_are_measured_in_float32(cls: type, dtype: torch.dtype):
    """At the values that are stored: the same model in float64 has the same products."""
    case = CASES["convnet"]
    model, microbatches = case.model(dtype), case.microbatches()
    products = []
    for one in (model, float64_copy(model)):
        with offline_problem(one, microbatches, loss=case.loss, params_filter=None) as problem:
            operator = cls(problem.objective, problem.microbatches)
            V = torch.randn(operator.shape[0], 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            products.append(operator.matmat(V.to(operator.dtype)))
    assert products[0].dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert relative_error(*products) < (3e-3 if cls is FiniteDifferenceHessianOperator else 1e-4)
