"""Spectra and coverage of a model on given batches, in one call and without a training loop."""
