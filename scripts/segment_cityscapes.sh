#!/usr/bin/env bash
# Dense labels on Cityscapes val (500 images), 19 classes.
# Reads leftImg8bit and gtFine in DATA or DATA/cityscapes; DATA is the folder that data sets lie in (default data).
#   DATA=/data PRETRAINED=clipself.pt bash scripts/segment_cityscapes.sh; the other variables are explained in _segment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_segment.sh"
segment cityscapes19 "$@"
