"""Makes the fvit package importable: F-ViT is run from its folder and not installed."""

from __future__ import annotations

import sys
from pathlib import Path

FVIT = str(Path(__file__).resolve().parents[2] / "F-ViT")
if FVIT not in sys.path:
    sys.path.append(FVIT)  # at the end: the folder holds a train.py and a test.py
