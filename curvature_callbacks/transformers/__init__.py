"""The adapter for the Hugging Face Trainer: its callback, the loss it minimises, its reporters."""

from curvature_callbacks.transformers.callback import CurvatureCallback

__all__ = ["CurvatureCallback"]
