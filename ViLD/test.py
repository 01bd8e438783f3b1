"""Test a detector: python test.py CONFIG CHECKPOINT --eval bbox [segm] [--crops ROW] [section.key=value ...].

With ``--crops`` the teacher judges crops of the detector's boxes: "clip", "clip-objectness" (of any detector, such as
the one that proposes regions) or "text-clip" (together with the detector's own scores).
"""

import sys
from pathlib import Path

try:
    from ovdet.vild.commands import test as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from ovdet.vild.commands import test as command

if __name__ == "__main__":
    sys.exit(command.run())
