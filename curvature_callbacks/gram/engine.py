"""Block Grams: `G_b G_b'` of the per-sample gradients of every block, for all samples of a probe."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.errors import RefusedError
from curvature_callbacks.gram.capture import Capture
from curvature_callbacks.gram.certificate import TOLERANCE, certificate_errors
from curvature_callbacks.gram.parameter_gram import parameter_gram
from curvature_callbacks.gram.rows import check_rows, finite_rows, row_grams
from curvature_callbacks.gram.uses import Use
from curvature_callbacks.model.blocks import Blocks
from curvature_callbacks.model.objective import Objective

Signature = frozenset[tuple[str, tuple[str, ...], tuple[int, ...]]]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockGrams:
    """Grams of one probe.

    Attributes:
        grams: block to (N, N) float64, unscaled, `K_ij = g_i . g_j` with `g_i` the gradient of the sample's *summed* loss.
        num_targets: (N,) valid targets of each sample.
        kinds: parameter to the operations that used it.
        fallback: parameter to why its gradients were taken row by row.
        certificate_error: largest relative error the certificate found over the parameters; None when it was not run.
    """

    grams: Mapping[str, Tensor]
    num_targets: Tensor
    kinds: Mapping[str, list[str]]
    fallback: Mapping[str, str]
    certificate_error: float | None


@final
@dataclass(slots=True, kw_only=True)
class Trust:
    """What earlier probes of a run proved: certified signatures, and parameters whose rule failed."""

    certified: set[Signature] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)


def block_grams(objective: Objective, microbatches: Sequence[Any], blocks: Blocks, *, trust: Trust, seed: int) -> BlockGrams:
    """Exact Grams of all blocks, unsubsampled, without the N x P matrix of gradients.

    One forward and one backward pass per microbatch record inputs and output gradients of every operation with a rule; the
    others' parameters take one gradient per row. Grams of a layout not met before are proved by random signs, parameter by
    parameter; one that fails is computed again row by row.

    Args:
        objective: the loss of a microbatch.
        microbatches: what N spans; cross terms between them are exact.
        blocks: parameter groups.
        trust: carried from probe to probe, updated here.
        seed: seed of the certificate's signs.

    Returns:
        The Grams; rows and columns of a sample without a finite gradient are not finite.

    Raises:
        RefusedError: samples are coupled, or no path gives a Gram that passes the certificate.

    Cost: 1.3 to 1.8 gradients once certified (GPT-2 shapes, N = 8 to 64, T = 128 to 32, one CPU thread), one more when not; N
    single-row gradients for parameters without a rule. Memory: inputs and output gradients of all microbatches but the last,
    plus 64 MiB.
    """
    capture = _capture(objective, microbatches, trust)
    grams = {name: gram for name, gram in capture.grams.items() if name not in capture.fallback}
    grams |= row_grams(objective, microbatches, list(capture.fallback))
    signature = _signature(capture)
    errors = None
    if signature not in trust.certified:
        if not finite_samples(grams).all():
            return _of_finite_rows(objective, microbatches, blocks, capture, trust=trust, seed=seed)
        errors = certificate_errors(objective, microbatches, grams, seed=seed)
        if _refuse_failed(errors, trust):
            return block_grams(objective, microbatches, blocks, trust=trust, seed=seed)
        trust.certified.add(signature)
    N = len(capture.num_targets)
    return BlockGrams(
        grams={block: _sum(grams, names, N, objective.device) for block, names in blocks.items()},
        num_targets=capture.num_targets,
        kinds=capture.kinds,
        fallback=capture.fallback,
        certificate_error=None if errors is None else max(errors.values()),
    )


def finite_samples(grams: Mapping[str, Tensor]) -> Tensor:
    """(N,) on CPU: whether a sample's gradient is finite in every one of `grams`."""
    return torch.stack([K.diagonal().cpu() for K in grams.values()]).isfinite().all(0)


def parameter_operations(objective: Objective, batch: Any) -> Mapping[str, list[str]]:
    """Parameter to the operations that use it, from one forward pass. Cost: that pass."""
    values = {name: parameter.detach() for name, parameter in objective.parameters.items()}
    capture = Capture(values, batch_size(batch), lambda name, uses: None, unruled={})
    with capture:
        objective(batch, values)
    return capture.kinds


def _refuse_failed(errors: Mapping[str, float], trust: Trust) -> bool:
    """Note the parameters whose certificate failed, so that they are taken row by row from here on; whether there are any."""
    failed = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    for name, error in failed.items():
        if name in trust.refused:
            raise RefusedError(
                f"`{name}` fails its certificate (relative error {error:.1e}) even row by row: the samples have no gradients "
                "of their own, or the loss is not a fixed function of the parameters."
            )
        trust.refused[name] = f"certificate failed (relative error {error:.1e})"
    return bool(failed)


def _of_finite_rows(
    objective: Objective, microbatches: Sequence[Any], blocks: Blocks, capture: "_Captured", *, trust: Trust, seed: int
) -> BlockGrams:
    """The Grams of the rows with a finite gradient, in their places.

    Which rows these are is found row by row: in a layout that is not proved yet one bad row may look like all of them.
    """
    usable = torch.cat([finite_rows(objective, batch) for batch in microbatches])
    if usable.all():  # only the batch overflows: no rule can be relied on
        trust.refused |= {name: "not finite in the batch" for name in objective.parameters if name not in trust.refused}
        return block_grams(objective, microbatches, blocks, trust=trust, seed=seed)
    unknown = torch.full((len(usable), len(usable)), torch.nan, dtype=torch.float64, device=objective.device)
    pieces = torch.split(usable, [batch_size(batch) for batch in microbatches])
    kept = [take_rows(batch, piece.nonzero()[:, 0]) for batch, piece in zip(microbatches, pieces, strict=True) if piece.any()]
    if not kept:
        return BlockGrams(
            grams=dict.fromkeys(blocks, unknown),
            num_targets=capture.num_targets,
            kinds=capture.kinds,
            fallback=capture.fallback,
            certificate_error=None,
        )
    inner = block_grams(objective, kept, blocks, trust=trust, seed=seed)
    place = usable.to(objective.device).nonzero()[:, 0]
    return replace(
        inner,
        grams={block: unknown.index_put((place[:, None], place), K) for block, K in inner.grams.items()},
        num_targets=capture.num_targets,
    )


@final
@dataclass(slots=True)
class _Captured:
    """What the hooked passes over all microbatches gave."""

    grams: dict[str, Tensor]
    num_targets: Tensor
    kinds: dict[str, list[str]]
    positions: dict[str, list[int]]
    fallback: dict[str, str]


def _capture(objective: Objective, microbatches: Sequence[Any], trust: Trust) -> _Captured:
    uses: dict[str, list[list[Use]]] = {name: [] for name in objective.parameters}
    result = _Captured({}, torch.empty(0, dtype=torch.int64), {}, {}, dict(trust.refused))
    sizes: list[int] = []
    for index, batch in enumerate(microbatches):
        last = index == len(microbatches) - 1

        def completed(name: str, found: list[Use], *, index: int = index, last: bool = last) -> None:
            uses[name] += [[] for _ in range(index - len(uses[name]))] + [found]
            if last:
                result.grams[name] = parameter_gram(uses.pop(name), sizes, objective.parameters[name].shape)

        _pass(objective, batch, completed, sizes, result)
    for name, found in uses.items():  # used by no microbatch's loss, or not by the last one
        padded = found + [[] for _ in range(len(sizes) - len(found))]
        result.grams[name] = parameter_gram(padded, sizes, objective.parameters[name].shape)
    return result


def _pass(objective: Objective, batch: Any, completed: Any, sizes: list[int], result: _Captured) -> None:
    """One microbatch: forward under the capture, then the activation gradients."""
    size = batch_size(batch)
    values = {name: parameter.detach() for name, parameter in objective.parameters.items()}
    capture = Capture(values, size, completed, unruled=result.fallback)
    with capture:
        losses = objective(batch, values)
    if losses.per_sample is None and size > 1:
        check_rows(objective, batch)
    sizes.append(size)
    capture.backward(losses.total)
    result.num_targets = torch.cat([result.num_targets, losses.num_targets.cpu()])
    for name, kinds in capture.kinds.items():
        result.kinds.setdefault(name, []).extend(kinds)
    for name, positions in capture.positions.items():
        result.positions.setdefault(name, []).extend(positions)


def _sum(grams: Mapping[str, Tensor], names: Sequence[str], N: int, device: torch.device) -> Tensor:
    total = torch.zeros(N, N, dtype=torch.float64, device=device)
    for name in names:
        total += grams[name].to(device)
    return total


def _signature(captured: _Captured) -> Signature:
    """Operations with the row layout of each: sample by sample (1), the usual (sample, position) pairs (0), or other."""
    flattened = Counter(count for counts in captured.positions.values() for count in counts if count > 1)
    usual = flattened.most_common(1)[0][0] if flattened else 0
    return frozenset(
        (name, tuple(sorted(set(kinds))), _layout(captured.positions.get(name, []), usual))
        for name, kinds in captured.kinds.items()
    )


def _layout(positions: Sequence[int], usual: int) -> tuple[int, ...]:
    return tuple(sorted({0 if count == usual else count for count in positions}))
