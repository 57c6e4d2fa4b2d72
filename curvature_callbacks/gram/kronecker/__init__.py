"""Kronecker factors of layers, computed from their uses."""
