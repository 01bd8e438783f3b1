"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers recorded from the reference implementation.

    The repository holds a part of them (tests/golden). Set CLIPSELF_GOLDEN to a folder with the complete set to check
    against all of it; tests whose files are not there skip themselves.
    """
    return Path(os.environ.get("CLIPSELF_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(autouse=True)
def log_handlers_put_back() -> Iterator[None]:
    """Handlers that a program run within a test adds to the root logger end with the test, as its terminal does."""
    root = logging.getLogger()
    before, level, disabled = list(root.handlers), root.level, root.manager.disable
    yield
    logging.disable(disabled)
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
