"""One call, no training loop."""
