"""Train a detector: python train.py CONFIG --work-dir DIR [--resume] [section.key=value ...]."""

import sys
from pathlib import Path

try:
    from ovdet.vild.commands import train as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from ovdet.vild.commands import train as command

if __name__ == "__main__":
    sys.exit(command.run())
