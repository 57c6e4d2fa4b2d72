"""Capture: operations of a forward pass met, their inputs and output gradients kept."""
