"""compute_spectrum: outer eigenpairs in one call."""

from typing import Any

from torch import nn

from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos.options import LanczosOptions, ReorthMode
from curvature_callbacks.linalg.lanczos.wanted import Which
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.batch_norm import BatchNorm
from curvature_callbacks.model.loss.fisher_type import Fisher, SampleUnit
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.problem.eigenproblem import Eigenproblem
from curvature_callbacks.problem.matrix import OperatorName
from curvature_callbacks.problem.matrix_choice import MatrixChoice


def compute_spectrum(
    model: nn.Module,
    batches: Any,
    *,
    operator: OperatorName | Operator = "hessian",
    sample_unit: SampleUnit = "sequence",
    fisher: Fisher = "empirical",
    num_draws: int = 1,
    sharing: Sharing = "expand",
    loss: Loss = None,
    optimizer: Optimizers | None = None,
    params_filter: ParamsFilter | None = None,
    batch_norm: BatchNorm | None = None,
    k: int = 10,
    which: Which = "BE",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    reorth_mode: ReorthMode = "auto",
    reorth_window: int = 8,
    reorth_period: int = 5,
    seed: int = 0,
    return_eigenvectors: bool = False,
    true_residuals: bool = False,
) -> Eigenpairs:
    """Outer eigenpairs of a curvature matrix of the model at the given data, each with its residual.

    With `L = sum_i l_i / sum_i n_i` the mean loss, J_it the Jacobian of the logits of target t of sample i, g a gradient:

    | `operator` | matrix | solver |
    | --- | --- | --- |
    | `hessian` | `d^2 L / d theta^2` | Lanczos |
    | `ggn` | `(1/sum_i n_i) sum_it J_it' H_it J_it`, H_it the Hessian of the loss in the logits | Lanczos |
    | `empirical_fisher` | `(1/N) sum_i g_i g_i'`, as in `compute_fisher_spectrum` | Gram up to 1000 rows, else Lanczos |
    | `sampled_fisher` | the same with labels drawn from the model's own predictive | Lanczos |
    | `kfac`, `ekfac` | Kronecker factors of a Fisher, of the layers that have them | the factors' own eigenvectors |
    | `preconditioned_hessian` | `P^-1/2 H P^-1/2`, P the optimizer's preconditioner, of what it moves | Lanczos |
    | `finite_difference_hessian` | `hessian` by differences of the gradient: for kernels without second derivative | Lanczos |

    All but the Hessians and operators of your own are positive semi-definite, and with fewer samples than parameters their
    smallest eigenvalues are zero: `which="LA"` spends all k on the top.

    Args:
        model: the module; left as found.
        batches: a microbatch or a list of them, see `compute_fisher_spectrum`.
        operator: one of these, or any operator object (its products run isolated from `model`; what is said about batches,
            loss and parameters is then not used).
        sample_unit: of the two Fishers: `sequence` (a row, its loss summed over its valid targets) or `token` (a valid target:
            `F = (1/sum_i n_i) sum_it g_it g_it'`, exact, by Lanczos).
        fisher: whose Kronecker factors: `empirical`, `sampled` or `exact`.
        num_draws: label draws a sample, where labels are drawn.
        sharing: how positions enter Kronecker factors: `expand` or `reduce`.
        loss: see `compute_fisher_spectrum`.
        optimizer: for `preconditioned_hessian`: SGD, Adam, AdamW, RMSprop, or several; only read.
        params_filter: `(name, parameter) -> bool`; the operator's diagonal block of these parameters.
        batch_norm: `batch` for the statistics of each batch, as in training, `eval` for running ones; None for `batch` in the
            Hessians and the GGN, `eval` in Fishers and their factors. Give batches of the size of training: where batch norms
            or the loss couple rows, the numbers depend on it. Modules in evaluation mode in a model that is in training mode
            stay on running statistics; these are left as found.
        k: pairs.
        which: `BE` both ends, `LA` largest, `SA` smallest, `LM` largest magnitude.
        tol: relative tolerance of the residuals, each by its own eigenvalue.
        max_matvecs: most products Lanczos may spend; default `max(100, 2 k + 20)`.
        max_seconds: stop Lanczos at the first look after this time.
        reorth_mode: `auto`, `full`, `partial`, `selective`, `off` or `thick_restart`, see `lanczos`; the one that ran is in the
            result.
        reorth_window: of `selective`.
        reorth_period: of `selective`.
        seed: seed of the start vector and of drawn labels.
        return_eigenvectors: also return the vectors (P, k), entries in the order of `model.named_parameters()`.
        true_residuals: compute `||A v - theta v||_2` rather than estimate it, at k more products; those of pairs from the Gram
            or from factors always are.

    Returns:
        The pairs, eigenvalues descending. Those of finite differences have a `product_error`.

    Raises:
        ConfigurationError: a bad choice, an undeterminable loss, no trainable parameter, no valid target; a loss without what
            the operator is made of (single rows, single targets, logits and their likelihood).
        RefusedError: a kernel in the model cannot be differentiated twice, or differences step over kinks; no layer has
            Kronecker factors; the optimizer's update is not known; a Fisher on the statistics of the batch.
        ProbeError: the loss or a product is not finite; the optimizer has not stepped yet.

    Cost: in gradients, Hessian 2 to build, three products for the self-check, then 1.6 to 2.5 a product; GGN and Fishers 1.5
    and 1.1 to 1.3 (2.2 with convolutions); finite differences 2 a product. Memory: once (GGN, Fishers) or twice a gradient's
    for graphs, as many microbatches as fit `device_budget`, and `max_matvecs + 1` vectors of size P (fewer where these do not
    fit: `thick_restart`). From the Gram: its own cost (see `compute_fisher_spectrum`) and one and a half to two and a half
    products a pair; memory k vectors.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
        >>> pairs = compute_spectrum(model, (x, y), loss="mse", k=1, which="LA")
        >>> torch.allclose(pairs.eigenvalues[0], torch.linalg.eigvalsh(2 * x.T @ x / 16)[-1])
        True
    """
    options = LanczosOptions(
        k=k,
        which=which,
        tol=tol,
        max_matvecs=max_matvecs,
        max_seconds=max_seconds,
        reorth_mode=reorth_mode,
        reorth_window=reorth_window,
        reorth_period=reorth_period,
        seed=seed,
        return_eigenvectors=return_eigenvectors,
        true_residuals=true_residuals,
    )
    if not isinstance(operator, str) and isinstance(operator, Operator):
        with isolated(model, seed=seed):
            return _checked_pairs(Eigenproblem(operator=operator), options)
    choice = MatrixChoice(operator=operator, sample_unit=sample_unit, fisher=fisher, num_draws=num_draws, sharing=sharing)
    with offline_problem(
        model, batches, loss=loss, params_filter=params_filter, seed=seed, optimizer=optimizer, batch_norm=batch_norm
    ) as problem:
        choice.check(problem, negative=options.asks_for_negative)
        return _checked_pairs(choice.eigenproblem(problem), options)


def _checked_pairs(task: Eigenproblem, options: LanczosOptions) -> Eigenpairs:
    task.check(seed=options.seed)
    return task.solve(options)
