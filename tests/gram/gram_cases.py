"""Block Grams of a model, asked of the driver itself with a memory, options and limits of the test's choice."""

from typing import Any

from torch import nn

from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.gram.block_grams import block_grams
from curvature_callbacks.gram.context import GramContext, GramLimits, GramOptions
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.result import BlockGrams
from curvature_callbacks.problem.problem import Problem

DEFAULTS, EMPIRICAL = GramLimits(), GramOptions()


def context_of(
    problem: Problem, memory: GramMemory | None = None, *, seed: int = 0, limits: GramLimits = DEFAULTS
) -> GramContext:
    return GramContext(objective=problem.objective, memory=GramMemory() if memory is None else memory, seed=seed, limits=limits)


def block_grams_of(
    problem: Problem,
    memory: GramMemory | None = None,
    *,
    seed: int = 0,
    limits: GramLimits = DEFAULTS,
    options: GramOptions = EMPIRICAL,
) -> BlockGrams:
    context = context_of(problem, memory, seed=seed, limits=limits)
    return block_grams(context, problem.microbatches, problem.blocks, options)


def model_grams(
    model: nn.Module,
    microbatches: list[Any],
    memory: GramMemory | None = None,
    *,
    loss: Any = "cross_entropy",
    structure: Any = "layer",
    seed: int = 0,
    limits: GramLimits = DEFAULTS,
    **options: Any,
) -> BlockGrams:
    """Grams of a problem made of the model; `options`: those of `GramOptions`."""
    with offline_problem(model, microbatches, loss=loss, params_filter=None, block_structure=structure) as problem:
        return block_grams_of(problem, memory, seed=seed, limits=limits, options=GramOptions(**options))


def parameter_grams(
    model: nn.Module, microbatches: list[Any], memory: GramMemory | None = None, *, loss: Any = "cross_entropy", **options: Any
) -> BlockGrams:
    """The same with every parameter a block."""
    return model_grams(model, microbatches, memory, loss=loss, structure="parameter", **options)
