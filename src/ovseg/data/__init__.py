"""Segmentation data sets: folder trees, label files, and samples."""
