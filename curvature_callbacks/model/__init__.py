"""The model as a function of its parameters: losses, blocks, isolation, checks."""
