"""Layers whose derivatives are one node of a few kernels each.

PyTorch composes second derivatives of many elementwise operations: 40 % of a ViT's Hessian product were not matrix products.
Here a layer's gradient is a node of its own ("adjoint") that is linear in what comes from above, and knows its own derivative:

    linear       y = x W' + b       adjoint (g W, g' x, sum g)
    layer norm   y = c z + b        adjoint (r P (c g), sum g z, sum g)      z = (x - mean) r, P = 1 - 1 1'/D - z z'/D
    pointwise    y = f(x)           adjoint f'(x) g
"""
