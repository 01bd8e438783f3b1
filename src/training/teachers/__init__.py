"""What teaches, and the store of its answers."""
