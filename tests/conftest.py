"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers recorded from the reference implementation."""
    return Path(__file__).parent / "golden"
