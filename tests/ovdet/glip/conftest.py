"""What the tests of GLIP share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def glip_golden(golden: Path) -> Path:
    """Folder of the recorded numbers."""
    folder = golden / "glip"
    if not folder.is_dir():
        pytest.skip("needs the recorded numbers (CLIPSELF_GOLDEN)")
    return folder


@pytest.fixture(scope="session")
def arrays(glip_golden: Path) -> Callable[[str], dict[str, Tensor]]:
    """Reads a file of recorded arrays; skips where it is not there."""

    def read(name: str) -> dict[str, Tensor]:
        path = glip_golden / name
        if not path.is_file():
            pytest.skip(f"needs {name} of the recorded numbers (CLIPSELF_GOLDEN)")
        with np.load(path) as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}

    return read
