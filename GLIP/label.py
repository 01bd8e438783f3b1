"""Label captions with a teacher: python label.py CAPTIONS --images ROOT --checkpoint FILE --out FOLDER."""

import sys
from pathlib import Path

try:
    from ovdet.glip.commands import label as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from ovdet.glip.commands import label as command

if __name__ == "__main__":
    sys.exit(command.run())
