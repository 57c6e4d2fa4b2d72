"""What one probe measures: model, loss and microbatches, and the matrices of them."""

from curvature_callbacks.problem.problem import Problem

__all__ = ["Problem"]
