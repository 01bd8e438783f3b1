#!/usr/bin/env bash
# Dense labels on COCO val2017 (5000 images): COCO-Stuff 171, then COCO-Object.
# Reads val2017 and stuffthingmaps in DATA or DATA/coco; DATA is the folder that data sets lie in (default data).
#   DATA=/data PRETRAINED=clipself.pt bash scripts/segment_coco.sh; the other variables are explained in _segment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_segment.sh"
segment coco_stuff171 "$@"
segment coco_object "$@"
