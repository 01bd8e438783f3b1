"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers recorded from the reference implementation.

    The repository holds a part of them (tests/golden). Set CLIPSELF_GOLDEN to a folder with the complete set to check
    against all of it; tests whose files are not there skip themselves.
    """
    return Path(os.environ.get("CLIPSELF_GOLDEN", Path(__file__).parent / "golden"))
