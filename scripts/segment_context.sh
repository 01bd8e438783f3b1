#!/usr/bin/env bash
# Dense labels on PASCAL Context val (5105 images): 59 classes, then with background.
# Reads DATA/VOCdevkit/VOC2010; DATA is the folder that VOCdevkit was unpacked into (default data).
#   DATA=/data PRETRAINED=clipself.pt bash scripts/segment_context.sh; the other variables are explained in _segment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_segment.sh"
segment context59 "$@"
segment context60 "$@"
