#!/usr/bin/env bash
# Dense labels on ADE20K val (2000 images), 150 classes.
# Reads DATA/ADEChallengeData2016; DATA is the folder that it was unpacked into (default data).
#   DATA=/data PRETRAINED=clipself.pt bash scripts/segment_ade20k.sh; the other variables are explained in _segment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_segment.sh"
segment ade150 "$@"
