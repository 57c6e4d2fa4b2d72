"""The adapter for Lightning: its callback, the loss of a `training_step`, its loggers."""

from curvature_callbacks.lightning.callback import CurvatureCallback

__all__ = ["CurvatureCallback"]
