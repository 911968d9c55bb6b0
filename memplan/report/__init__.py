"""Records to ink: one module a view. Nothing here computes a plan; GiB and per cent are made here only."""
