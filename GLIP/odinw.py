"""Test, or tune and test, on many data sets: python odinw.py ROOT --checkpoint FILE [--mode MODE --shots N ...]."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import ovdet  # noqa: F401
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from ovdet.glip.commands.odinw import main

if __name__ == "__main__":
    sys.exit(main())
