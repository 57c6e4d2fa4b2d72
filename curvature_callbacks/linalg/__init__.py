"""Tensors, not networks: operators, Lanczos, spectra."""
