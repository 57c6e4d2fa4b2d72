"""One training run: when to probe, one probe, what lasts from probe to probe."""
