#!/usr/bin/env bash
# Dense labels on PASCAL VOC 2012 val (1449 images): 20 classes, then with background.
# Reads DATA/VOCdevkit/VOC2012; DATA is the folder that VOCdevkit was unpacked into (default data).
#   DATA=/data PRETRAINED=clipself.pt bash scripts/segment_voc.sh; the other variables are explained in _segment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_segment.sh"
segment voc20 "$@"
segment voc21 "$@"
