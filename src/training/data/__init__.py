"""Annotations to regions to samples to packed batches."""

from training.data.loader import TrainData, build_train_data
from training.data.prepare import DevicePrefetcher, prepare_batch

__all__ = ["DevicePrefetcher", "TrainData", "build_train_data", "prepare_batch"]
