"""Fishers of small models, with per-row and per-target gradients one backward pass at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from curvature_callbacks import Problem
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator
from tests.cases import Case
from tests.reference import IGNORED, gradients_of, row_loss, rows, sample_gradients, stacked

UNITS = ("sequence", "token")
TOKENS = ("gpt2", "llama", "bert", "t5", "vit", "mlp")  # families whose single targets the oracle walks through
DENSE = ("transformer.h.1.ln_1", "transformer.h.1.attn.c_proj", "transformer.ln_f")  # of gpt2, few enough for a matrix
TOLERANCE = 1e-5  # float32 inside Hugging Face's norms, rotary embeddings and losses


@contextmanager
def problem_of(case: Case, model: nn.Module, microbatches: list[Any], **options: Any) -> Iterator[Problem]:
    with offline_problem(model, microbatches, **{"loss": case.loss, "params_filter": None, **options}) as problem:
        yield problem


@contextmanager
def fisher_of(
    case: Case, model: nn.Module, microbatches: list[Any], unit: str = "sequence", **options: Any
) -> Iterator[EmpiricalFisherOperator]:
    with problem_of(case, model, microbatches, **options) as problem:
        yield problem.empirical_fisher(sample_unit=unit)


def prefixed(*prefixes: str) -> dict[str, Any]:
    return {"params_filter": lambda name, _: name.startswith(prefixes)}


def row_gradients(case: Case, model: nn.Module, microbatches: Sequence[Any]) -> Tensor:
    """(N, P)."""
    return stacked(sample_gradients(model, microbatches, case.kind))


def target_gradients(case: Case, model: nn.Module, microbatches: Sequence[Any]) -> Tensor:
    """(sum n_i, P): one gradient of one target at a time, its logits looked up in a pass over its row."""
    losses = []
    for row in rows(microbatches):
        if case.kind in ("row", "pair"):
            losses.append(lambda m, row=row: row_loss(m, row, case.kind))
            continue
        shift = 1 if case.kind == "causal" else 0
        for position, label in enumerate(row["labels"][0].tolist()):
            if label != IGNORED and position >= shift:
                at = position - shift
                losses.append(lambda m, row=row, at=at, label=label: -m(**row).logits[0, at].double().log_softmax(0)[label])
    return stacked(gradients_of(model, losses))


def oracle(case: Case, model: nn.Module, microbatches: Sequence[Any], unit: str) -> Tensor:
    return (row_gradients if unit == "sequence" else target_gradients)(case, model, microbatches)


def vector(size: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
