"""Make the annotation files of the open-vocabulary benchmarks from the official ones.

    python tools/prepare_open_vocabulary.py coco --train data/coco/annotations/instances_train2017.json \\
        --val data/coco/annotations/instances_val2017.json
    python tools/prepare_open_vocabulary.py lvis --train data/lvis_v1/annotations/lvis_v1_train.json
    python tools/prepare_open_vocabulary.py voc --root data/VOCdevkit/VOC2007 \\
        --out data/voc2007/annotations/voc07_test.json

``coco``: ``*_base.json`` with the base classes' objects for training, ``*_ov65.json`` with base and novel ones for
testing (``--split FILE`` for lists of your own: json with "base" and "novel"). ``lvis``: ``*_norare.json`` without the
rare classes. ``voc``: the XML files of a split as one json. Files are written beside the official ones unless ``--out``
is given; images without an object of the classes kept are left out.
"""

import sys
from pathlib import Path

try:
    from ovdet.commands import prepare_open_vocabulary as command
except ImportError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    from ovdet.commands import prepare_open_vocabulary as command

if __name__ == "__main__":
    sys.exit(command.run())
