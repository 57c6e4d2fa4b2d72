"""What the passes of microbatches and processes were, put together, and the pseudo-samples they make up."""

import torch

from curvature_callbacks.gram.passed import Observed, Passed, pseudo_samples
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.processes.world import SINGLE

LINEAR, BIAS = Operation("linear"), Operation("bias", is_bias=True)


def observed(targets: list[int], num_passes: int, weight_bias: str | None) -> Observed:
    return Observed(
        sizes=[len(targets)] * num_passes,
        num_passes=[num_passes],
        num_targets=[torch.tensor(targets)],
        operations={"weight": [LINEAR], "bias": [BIAS]} if weight_bias else {"weight": [LINEAR]},
        positions={"weight": [len(targets)]},
    )


def test_passes_follow_each_other_and_what_they_saw_is_merged():
    parts = [observed([1, 2], 2, "bias"), observed([3], 1, None)]
    joined = Observed.joined(parts)
    assert list(joined.sizes) == [2, 2, 1]
    assert list(joined.num_passes) == [2, 1]
    assert [targets.tolist() for targets in joined.num_targets] == [[1, 2], [3]]
    assert joined.operations == {"weight": [LINEAR, LINEAR], "bias": [BIAS]}
    assert joined.positions == {"weight": [2, 1]}
    assert parts[0].operations == {"weight": [LINEAR], "bias": [BIAS]}  # not changed by it


def test_of_no_microbatch_there_are_no_pseudo_samples():
    passed = Passed(microbatches=[], surrogates=[], observed=Observed.joined([]))
    samples, weights, active = pseudo_samples(passed, SINGLE)
    assert [len(part) for part in (samples, weights, active)] == [0, 0, 0]


def test_every_backward_pass_has_a_pseudo_sample_a_row():
    seen = Observed.joined([observed([1, 2], 1, None), observed([3, 0, 1], 1, None)])
    passed = Passed(microbatches=["first", "second"], surrogates=[[None], [None]], observed=seen)
    samples, weights, active = pseudo_samples(passed, SINGLE)
    assert samples.tolist() == [0, 1, 2, 3, 4]
    assert weights.tolist() == [1.0] * 5
    assert active.all()
