"""Detection parts that take numbers and modules, never a config."""
