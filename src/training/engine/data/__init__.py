"""Readers shared by all programs: images, annotations, masks, samplers, workers."""
