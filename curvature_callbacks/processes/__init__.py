"""Many processes: exchange between them, one failure for all, sharded parameters."""
