"""Annotations to regions to samples to packed batches."""

from training.data.loader import TrainData, build_train_data
from training.data.options import DataOptions, RegionOptions
from training.data.prepare import DevicePrefetcher, View, prepare_batch

__all__ = ["DataOptions", "DevicePrefetcher", "RegionOptions", "TrainData", "View", "build_train_data", "prepare_batch"]
