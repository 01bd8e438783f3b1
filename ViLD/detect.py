"""Detect classes of your choice: python detect.py IMAGE|FOLDER... --checkpoint FILE --classes "cat,dog,red car"."""

import sys
from pathlib import Path

try:
    from ovdet.commands import detect as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from ovdet.commands import detect as command

if __name__ == "__main__":
    sys.exit(command.run())
