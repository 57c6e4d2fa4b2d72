"""Eigenpairs of an operator by Lanczos."""

from curvature_callbacks.linalg.lanczos.solver import lanczos

__all__ = ["lanczos"]
