"""Class-agnostic proposals, and region-text pairs, for images of your own with a trained detector.

    python tools/make_proposals.py CONFIG CHECKPOINT --images data/coco/annotations/instances_train2017.json \\
        --image-root data/coco/train2017 --out data/coco --name mine [--nouns nouns.txt]

Writes ``NAME_proposals.json`` (boxes for CLIPSelf's region-proposal training). With ``--nouns`` (one name a line) also
``NAME_pseudo_N.json``, where each box has the noun that CLIP finds most like its crop, and
``NAME_pseudo_N_embeddings.npy``, the N nouns' embeddings: the training data of RegionCLIP. ``--images`` is a folder,
or a COCO or LVIS json whose image ids are kept. Files that are there are replaced with ``--force`` alone:
``coco_proposals.json`` in ``data/coco`` is the published file. torchrun shares the work among processes.
"""

import sys
from pathlib import Path

try:
    from ovdet.fvit.commands import make_proposals as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    from ovdet.fvit.commands import make_proposals as command

if __name__ == "__main__":
    sys.exit(command.run())
