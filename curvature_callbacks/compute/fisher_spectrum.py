"""Per-block spectrum of a Fisher matrix: empirical, sampled or exact, of sequences or tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from curvature_callbacks.compute.gradient_sources import PerSampleGradients, spectra_of_gradients
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.errors import check_positive
from curvature_callbacks.measurements.fisher_spectrum import FisherSpectrum, spectra_of_problem
from curvature_callbacks.microbatch import Microbatch, as_microbatch, as_microbatches
from curvature_callbacks.model.batch_norm import BatchNorm
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.loss.fisher_type import Fisher, SampleUnit
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.statistics.fisher_spectra import EigensolveDevice, FisherSpectra, warned


def compute_fisher_spectrum(
    model: nn.Module,
    batches: Any,
    *,
    loss: Loss = None,
    fisher: Fisher = "empirical",
    sample_unit: SampleUnit = "sequence",
    num_draws: int = 1,
    num_targets: int = 8,
    block_structure: BlockStructure = "layer",
    params_filter: ParamsFilter | None = None,
    batch_norm: BatchNorm | None = None,
    center_gradients: bool = False,
    num_samples: int | None = None,
    precomputed_gradients: PerSampleGradients | None = None,
    max_params_per_block: int | None = None,
    max_sample_grad_norm: float | None = None,
    memory_budget: int | None = None,
    eigensolve_device: EigensolveDevice = "auto",
    deterministic: bool = False,
    seed: int = 0,
) -> FisherSpectra:
    """Spectra of a Fisher matrix, by default `F = (1/N) sum_i g_i g_i'`: per block, of all of it, of its block diagonal.

    Sample i is a row; `g_i` is the gradient of its loss *summed* over its `n_i` valid targets (sample unit `sequence`), with
    the model's own shift and mask. `token`: `F = sum_it g_it g_it' / sum_i n_i` over single targets. With labels drawn from
    the model's own predictive (`sampled`) or in expectation over it (`exact`) instead of the given ones; the exact Fisher of
    tokens is the GGN of the mean loss. Evaluation mode (BatchNorm uses its running statistics, dropout is off). No
    regularisation. Rows without valid target or with a non-finite gradient are left out and counted.

    Args:
        model: the module; left as found.
        batches: a microbatch or a list of them. A mapping is called as `model(**batch)`, a tuple `(inputs, targets)` as
            `model(inputs)`. N spans all of them, cross terms exact.
        loss: None for the model's own `.loss`; `cross_entropy`, `mse` or `bce` for tuples (mean over rows); or
            `(model, batch) -> scalar mean | (N,) per-sample losses`.
        fisher: `empirical`, `sampled` or `exact`; the last two need a loss whose likelihood is known: the model's own in a
            standard form, or a named one.
        sample_unit: `sequence` or `token`.
        num_draws: label draws per sample, for `sampled`.
        num_targets: targets drawn per row without replacement, for the `token` unit of `empirical` and `sampled`; unbiased,
            and exact where it reaches `n_i`.
        block_structure: `layer`, `component`, `module`, `parameter`, `none`, `{block: [names]}` or a function; see
            `group_blocks`.
        params_filter: `(name, parameter) -> bool`, which trainable parameters to measure.
        batch_norm: None and `eval` use running statistics; `batch` is refused where the model has batch norms, because the
            statistics of a batch couple its samples.
        center_gradients: subtract the mean gradient: the covariance `F - g g'`.
        num_samples: use the first so many rows only; default all.
        precomputed_gradients: one mapping from parameter name to gradient per sample; `batches` and `loss` are then unused.
        max_params_per_block: most parameters of a block to use, in slices of the first axis drawn at random (at least one
            a parameter), the same for all samples, the trace rescaled so that it stays unbiased; default all.
        max_sample_grad_norm: scale gradients longer than this (over all parameters) down to it; default none. Not for `exact`.
        memory_budget: bytes on the model's device for the factors of all microbatches but the last; default 2 GiB on a CPU,
            half of what is free on an accelerator. What does not fit goes to the host (half of its free memory), and what
            does not fit there is captured in further rounds over the microbatches: the same numbers, another gradient a round.
        eigensolve_device: `auto` (the model's device), `cpu` or `cuda`; the eigensolve is float64 everywhere.
        deterministic: use PyTorch's deterministic algorithms inside, restored after; the same bits run to run. CUDA needs the
            environment variable `CUBLAS_WORKSPACE_CONFIG=:4096:8`.
        seed: seeds labels, targets and parameters drawn, and the certificate's weights.

    Returns:
        The spectra; with fewer than two usable samples a warning and empty ones. A warning also where rows were left out, or
        where a fast Gram was proven wrong and computed row by row.

    Raises:
        ConfigurationError: an unknown choice, an undeterminable loss, no trainable parameter, no valid target; a loss without
            known targets or likelihood where these are needed, an exact Fisher of more than 1024 passes.
        RefusedError: samples are coupled, so that they have no gradients of their own; rows that are to be taken apart, of
            `num_samples` too, lie in batches of a layout that is not known.

    Cost: 0.95 to 1.4 gradients of the same rows on transformers of width 192 and more (one CPU thread;
    benchmarks/results/fisher.json has these and dearer cases), two to three more where the layout of the model is not
    certified yet; parameters without a capture rule take N single-row gradients, listed in `metadata["fallback"]`. One more
    backward pass for every further draw and target, for `exact` for every position and class, and an eigensolve of all
    their gradients together. Small microbatches cost less than a pass each: after the first, those of equal shapes are run
    together up to 8 MiB of inputs and output gradients. Memory: inputs and
    output gradients of all passes but the last within `memory_budget`; 32 MiB of gradients at a time (80 MiB for convolutions,
    at most 256 MiB for parameters that go row by row, are used through computed copies or through views that overlap); `8 S^2`
    bytes a parameter for S pseudo-samples. A loss that is only known as a mean takes one more forward pass over every row.

    References: Kunstner, Balles and Hennig (2019), "Limitations of the empirical Fisher approximation".

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> spectra = compute_fisher_spectrum(model, (x, y), loss="cross_entropy", block_structure="none")
        >>> gradients = [
        ...     torch.cat([g.flatten() for g in torch.autograd.grad(
        ...         torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))])
        ...     for i in range(8)
        ... ]
        >>> dense = sum(torch.outer(g, g) for g in gradients) / 8
        >>> torch.allclose(spectra.full.eigenvalues[0].float(), torch.linalg.eigvalsh(dense)[-1], rtol=1e-4)
        True
    """
    options = FisherSpectrum(
        fisher=fisher,
        sample_unit=sample_unit,
        num_draws=num_draws,
        num_targets=num_targets,
        center_gradients=center_gradients,
        max_params_per_block=max_params_per_block,
        max_sample_grad_norm=max_sample_grad_norm,
        memory_budget=memory_budget,
        eigensolve_device=eigensolve_device,
        deterministic=deterministic,
    )
    if precomputed_gradients is not None:
        precomputed_gradients = precomputed_gradients[:num_samples]
        return warned(spectra_of_gradients(model, precomputed_gradients, block_structure, params_filter, options))
    microbatches = [as_microbatch(batch) for batch in as_microbatches(batches)]
    if num_samples is not None:
        check_positive("num_samples", num_samples)
        microbatches = _first_rows(microbatches, num_samples)
    with offline_problem(
        model,
        microbatches,
        loss=loss,
        params_filter=params_filter,
        block_structure=block_structure,
        seed=seed,
        batch_norm=batch_norm,
    ) as problem:
        return warned(spectra_of_problem(problem, options))


def _first_rows(microbatches: Sequence[Microbatch], count: int) -> list[Microbatch]:
    kept = []
    for batch in microbatches:
        rows = min(batch.num_rows, count)
        if rows:
            kept.append(batch.take(torch.arange(rows)))
        count -= rows
    return kept
