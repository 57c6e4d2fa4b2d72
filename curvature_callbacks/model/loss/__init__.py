"""The loss: what is minimised, its values by sample, and what is differentiated in its place."""
