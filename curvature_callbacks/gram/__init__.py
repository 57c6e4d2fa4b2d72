"""Exact per-block Gram matrices of per-sample gradients from one hooked forward and backward pass."""
