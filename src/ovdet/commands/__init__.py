"""Commands that all detectors share."""
