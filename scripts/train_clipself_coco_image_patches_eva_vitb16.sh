#!/usr/bin/env bash
# CLIPSelf with image patches on COCO, EVA02-CLIP-B/16.
# Further arguments are passed on and override: bash scripts/train_clipself_coco_image_patches_eva_vitb16.sh --batch-size 4 --name mine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_vitb16
recipe_args
run_training --dataset-type grid_distill --name clipself_coco_image_patches_eva_vitb16 --alpha 0.7 \
    --train-data "$DATA/annotations/instances_train2017.json" --train-image-root "$DATA/train2017" \
    "${MODEL_ARGS[@]}" "${RECIPE_ARGS[@]}" "${VAL_ARGS[@]}" "$@"
