"""Test a detector: python test.py CONFIG CHECKPOINT --eval bbox [segm] [section.key=value ...]."""

import sys
from pathlib import Path

try:
    from ovdet.fvit.commands import test as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from ovdet.fvit.commands import test as command

if __name__ == "__main__":
    sys.exit(command.run())
