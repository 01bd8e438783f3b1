"""Fixtures of the segmentation tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def recorded(golden: Path) -> Callable[[str], dict]:
    """``recorded("pamr.npz")``: arrays of the golden folder ``dense_labels`` as tensors; skips when it is not there."""

    def load(name: str) -> dict:
        path = golden / "dense_labels" / name
        if not path.is_file():
            pytest.skip(f"{name} is not among the golden files: set CLIPSELF_GOLDEN to the complete folder")
        with np.load(path) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load
