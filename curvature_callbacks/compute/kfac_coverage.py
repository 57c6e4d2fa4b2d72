"""K-FAC coverage: how much of the model has Kronecker factors."""

from typing import Any

from torch import nn

from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.measurements.kfac_coverage import KFACCoverageReport, coverage_of
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.objective import ParamsFilter


def compute_kfac_coverage(
    model: nn.Module, batches: Any, *, loss: Loss = None, params_filter: ParamsFilter | None = None
) -> KFACCoverageReport:
    """Share of the trainable parameters in layers with Kronecker factors, from the operations a forward pass runs.

    Args:
        model: the module; left as found.
        batches: a microbatch or a list of them, see `compute_fisher_spectrum`.
        loss: see `compute_fisher_spectrum`.
        params_filter: `(name, parameter) -> bool`, which trainable parameters to count.

    Returns:
        The report; `gradient_energy` is 0 when the gradient vanishes.

    Raises:
        ConfigurationError: an undeterminable loss, no trainable parameter, no valid target.

    Cost: one gradient and one forward pass.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> report = compute_kfac_coverage(model, (torch.randn(8, 4), torch.randint(2, (8,))), loss="cross_entropy")
        >>> round(report.elements, 3), sorted(report.uncovered)
        (0.789, ['1.bias', '1.weight'])
    """
    with offline_problem(model, batches, loss=loss, params_filter=params_filter) as problem:
        return coverage_of(problem)
