#!/usr/bin/env bash
# Dense labels on COCO panoptic turned semantic, or any set in its layout. Reads DATA/annotations/panoptic_val2017.
#   DATA=/data PRETRAINED=clipself.pt bash scripts/segment_panoptic.sh; the other variables are explained in _segment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_segment.sh"
segment panoptic "$@"
