#!/usr/bin/env bash
# Mean accuracy of boxes, masks and crops on COCO panoptic, EVA02-CLIP-B/16.
#   bash scripts/test_eva_vitb16_macc_boxes_masks.sh NAME CHECKPOINT [further arguments]
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash scripts/$(basename "$0") NAME CHECKPOINT [further arguments]" >&2
    exit 2
fi
NAME="$1"
CHECKPOINT="$(realpath -m "$2")"
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_vitb16
run_training "${MODEL_ARGS[@]}" "${VAL_ARGS[@]}" --pretrained "$CHECKPOINT" --train-data "" --name "$NAME" \
    --batch-size 1 --workers 4 "$@"
