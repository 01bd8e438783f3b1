"""Open-vocabulary detection: shared parts, and one detector in each sub-package."""
