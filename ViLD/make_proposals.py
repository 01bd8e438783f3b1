"""Write the proposals of a detector: python make_proposals.py CONFIG CHECKPOINT --split train|val --out FOLDER.

The folder holds boxes with objectness as arrays that open as memory maps. Where the images' objects are annotated, the
recall of the proposals is printed, for base and novel classes. An interrupted run goes on where it was; torchrun shares
the work among processes.
"""

import sys
from pathlib import Path

try:
    from ovdet.vild.commands import make_proposals as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from ovdet.vild.commands import make_proposals as command

if __name__ == "__main__":
    sys.exit(command.run())
