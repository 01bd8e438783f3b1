#!/usr/bin/env bash
# Dense labels on COCO panoptic turned semantic, or any set in its layout.
# Reads annotations/panoptic_val2017 and val2017 in DATA or DATA/coco; DATA is the folder that data sets lie in (default data).
#   DATA=/data PRETRAINED=clipself.pt bash scripts/segment_panoptic.sh; the other variables are explained in _segment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_segment.sh"
segment panoptic "$@"
