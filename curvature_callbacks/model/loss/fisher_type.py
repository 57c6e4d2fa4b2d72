"""FisherType: which Fisher matrix is meant, by the labels of its gradients and by what counts as a sample."""

from dataclasses import dataclass
from typing import Final, Literal, final, get_args

from torch import Tensor

from curvature_callbacks.errors import ConfigurationError, check_choice, check_positive

Fisher = Literal["empirical", "sampled", "exact"]

SampleUnit = Literal["sequence", "token"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FisherType:
    """Which Fisher, and of what.

    `F = sum_s g~_s g~_s' / normaliser` over pseudo-samples s. For `sequence` a sample is a row, `F = (1/N) sum_i E[g_i g_i']`
    with `g_i` the gradient of its loss summed over targets; for `token` a target, `F = sum_it E[g_it g_it'] / sum_i n_i`.

    Args:
        fisher: where the labels come from: `empirical` (given), `sampled` (drawn from the model's own predictive), `exact`
            (the expectation over it, class by class: the GGN for cross-entropy, squared and binary losses).
        sample_unit: `sequence` or `token`.
        num_draws: label draws per sample, for `sampled`.
        num_targets: targets drawn per row without replacement, for the `token` unit of `empirical` and `sampled`; unbiased,
            and exact where it reaches the row's `n_i`.
    """

    fisher: Fisher = "empirical"
    sample_unit: SampleUnit = "sequence"
    num_draws: int = 1
    num_targets: int = 8

    def __post_init__(self) -> None:
        check_choice("fisher", self.fisher, get_args(Fisher))
        check_choice("sample_unit", self.sample_unit, get_args(SampleUnit))
        check_positive("num_draws", self.num_draws)
        check_positive("num_targets", self.num_targets)
        if self.num_draws > 1 and self.fisher != "sampled":
            raise ConfigurationError(
                f"`num_draws`={self.num_draws} needs `fisher`='sampled': the {self.fisher} Fisher draws no labels."
            )

    @property
    def name(self) -> str:
        """`<fisher>_fisher`, with `_token` behind it for that unit: no two types share a name."""
        return f"{self.fisher}_fisher" + ("_token" if self.sample_unit == "token" else "")

    def normaliser(self, num_targets: Tensor) -> int:
        """What `sum_s g~_s g~_s'` is divided by, for the rows used, of which `num_targets` (N,) are the valid targets."""
        units = len(num_targets) if self.sample_unit == "sequence" else int(num_targets.sum())
        return units * self.num_draws


EMPIRICAL: Final = FisherType()
