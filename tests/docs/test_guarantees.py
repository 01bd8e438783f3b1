"""Every test that the guarantees name is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_named_tests_exist():
    text, file, named = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8"), None, 0
    for place, name in re.findall(r"`((?:[\w/]+\.py)?)::(\w+)[^`]*`", text):
        file = place or file  # "::name" alone is of the file before it
        path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / "training" / file
        assert path.is_file(), f"docs/guarantees.md names {file}, which is not there"
        assert re.search(rf"def {name}\b", path.read_text(encoding="utf-8")), f"{file} has no {name}"
        named += 1
    assert named > 30
