"""Annotations, images, samples and loaders of the detector."""

from __future__ import annotations
