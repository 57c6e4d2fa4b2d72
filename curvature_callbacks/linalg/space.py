"""The path under which `LocalSpace` was public before; new code imports `curvature_callbacks.space`."""

from curvature_callbacks.space import LOCAL, LocalSpace, Space

__all__ = ["LOCAL", "LocalSpace", "Space"]
