"""Private names of PyTorch, Transformers, accelerate and Lightning, behind functions that say what they mean.

Only here and in the two adapters is a name used that these libraries do not promise to keep; tests/library_internals has one
test a name, which fails by that name where a new release has dropped it. Nothing private is looked up at import: a name that
is gone fails where it is needed, in a probe, and not `import curvature_callbacks`.

`tensors`: tensors, their storages, operations and graphs. `modules`: modules, their hooks, checkpointing. `fsdp`: sharded
parameters. `frameworks`: the marks that Transformers, accelerate and Lightning leave on models, configurations and data sets.
"""
