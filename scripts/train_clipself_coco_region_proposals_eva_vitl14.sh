#!/usr/bin/env bash
# CLIPSelf with region proposals on COCO, EVA02-CLIP-L/14-336.
# Further arguments are passed on and override: bash scripts/train_clipself_coco_region_proposals_eva_vitl14.sh --batch-size 4 --name mine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_vitl14
recipe_args
run_training --dataset-type proposals_distill --name clipself_coco_region_proposals_eva_vitl14 --alpha 0.95 \
    --train-data "$DATA/coco_proposals.json" --train-image-root "$DATA/train2017" \
    "${MODEL_ARGS[@]}" "${RECIPE_ARGS[@]}" "${VAL_ARGS[@]}" "$@"
