"""Leave no trace: what a probe saves before and puts back after."""
