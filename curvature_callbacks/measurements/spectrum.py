"""compute_spectrum: outer eigenpairs in one call."""

from typing import Any

from torch import nn

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos import Which, lanczos
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.linalg.symmetry import check_symmetric
from curvature_callbacks.measurements.base import offline_problem
from curvature_callbacks.measurements.eigenproblem import OperatorName, check_operator, check_options, eigenproblem
from curvature_callbacks.model.isolation import isolated
from curvature_callbacks.model.losses import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.surrogates import SampleUnit


def compute_spectrum(
    model: nn.Module,
    batches: Any,
    *,
    operator: OperatorName | Operator = "hessian",
    sample_unit: SampleUnit = "sequence",
    loss: Loss = None,
    params_filter: ParamsFilter | None = None,
    k: int = 10,
    which: Which = "BE",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    seed: int = 0,
    return_eigenvectors: bool = False,
    true_residuals: bool = False,
) -> Eigenpairs:
    """Outer eigenpairs of a curvature matrix of the model at the given data, each with its residual.

    `hessian`: of the mean loss `L = sum_i l_i / sum_i n_i`. `empirical_fisher`: `F = (1/N) sum_i g_i g_i'`, as in
    `compute_fisher_spectrum`; for up to 1000 rows from their Gram (`reorth_mode` is then `gram`), else by Lanczos. With fewer
    samples than parameters the smallest eigenvalues of a Fisher are zero: `which="LA"` spends all k on the top.

    Args:
        model: the module; left as found.
        batches: a microbatch or a list of them, see `compute_fisher_spectrum`.
        operator: `hessian`, `empirical_fisher`, or any operator object (its products run isolated from `model`; `batches`,
            `loss`, `params_filter` and `sample_unit` are not used).
        sample_unit: of the Fisher: `sequence` (a row, its loss summed over its valid targets) or `token` (a valid target:
            `F = (1/sum_i n_i) sum_it g_it g_it'`, exact, by Lanczos).
        loss: see `compute_fisher_spectrum`.
        params_filter: `(name, parameter) -> bool`; the operator's diagonal block of these parameters.
        k: pairs.
        which: `BE` both ends, `LA` largest, `SA` smallest, `LM` largest magnitude.
        tol: relative tolerance of the residuals, each by its own eigenvalue.
        max_matvecs: most products Lanczos may spend; default `max(100, 2 k + 20)`.
        seed: seed of the start vector.
        return_eigenvectors: also return the vectors (P, k), entries in the order of `model.named_parameters()`.
        true_residuals: compute `||A v - theta v||_2` rather than estimate it, at k more products; those of pairs from the Gram
            always are.

    Returns:
        The pairs, eigenvalues descending.

    Raises:
        ConfigurationError: a bad choice, an undeterminable loss, no trainable parameter, no valid target; of the Fisher, a
            loss that is only known as the mean of a batch (`token`: of a row).
        RefusedError: a kernel in the model cannot be differentiated twice.

    Cost: 2 gradients, three products for the self-check, then 2.1 to 2.8 gradients a product on transformers (1.4 to 1.6 for
    the Fisher); memory `max_matvecs + 1` vectors of size P and about 2.5 times a gradient's activations. From the Gram: its own
    cost (see `compute_fisher_spectrum`) and one and a half to two and a half products a pair; memory k vectors.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
        >>> pairs = compute_spectrum(model, (x, y), loss="mse", k=1, which="LA")
        >>> torch.allclose(pairs.eigenvalues[0], torch.linalg.eigvalsh(2 * x.T @ x / 16)[-1])
        True
    """
    check_options(k=k, which=which, tol=tol, max_matvecs=max_matvecs)
    options: dict[str, Any] = {
        "k": k,
        "which": which,
        "tol": tol,
        "max_matvecs": max_matvecs,
        "seed": seed,
        "return_eigenvectors": return_eigenvectors,
        "true_residuals": true_residuals,
    }
    if not isinstance(operator, str):
        if not isinstance(operator, Operator):
            raise ConfigurationError(
                "`operator` must be 'hessian', 'empirical_fisher' or have shape, dtype, device, is_psd and matmat."
            )
        with isolated(model, seed=seed):
            check_symmetric(operator, seed=seed)
            return lanczos(operator, **options)
    check_operator(operator, sample_unit)
    with offline_problem(model, batches, loss=loss, params_filter=params_filter, seed=seed) as problem:
        task = eigenproblem(problem, operator, sample_unit=sample_unit)
        task.check(seed=seed)
        return task.solve(**options)
