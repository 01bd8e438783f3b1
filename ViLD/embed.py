"""Embed the crops of all proposals with the teacher: python embed.py CONFIG [section.key=value ...].

``data.proposals`` names the list that make_proposals.py wrote for the images of ``data.train_annotations``,
``data.store`` the folder to fill. An interrupted run goes on where it was; torchrun shares the work among processes.
"""

import sys
from pathlib import Path

try:
    from ovdet.vild.commands import embed as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from ovdet.vild.commands import embed as command

if __name__ == "__main__":
    sys.exit(command.run())
