#!/usr/bin/env bash
# RegionCLIP baseline with region-text pairs on COCO, EVA02-CLIP-L/14-336.
# Further arguments are passed on and override: bash scripts/train_regionclip_coco_eva_vitl14.sh --batch-size 4 --name mine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_vitl14
recipe_args
run_training --dataset-type region_clip --name regionclip_coco_eva_vitl14 --alpha 0.95 \
    --train-data "$DATA/coco_pseudo_4764.json" --train-image-root "$DATA/train2017" \
    "${MODEL_ARGS[@]}" "${RECIPE_ARGS[@]}" "${VAL_ARGS[@]}" "${NOUN_ARGS[@]}" "$@"
