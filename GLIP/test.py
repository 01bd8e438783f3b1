"""Test a GLIP: python test.py CHECKPOINT [--config CONFIG] [section.key=value ...]."""

import sys
from pathlib import Path

try:
    from ovdet.glip.commands import test as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from ovdet.glip.commands import test as command

if __name__ == "__main__":
    sys.exit(command.run())
