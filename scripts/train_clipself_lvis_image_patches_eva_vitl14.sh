#!/usr/bin/env bash
# CLIPSelf with image patches on LVIS, EVA02-CLIP-L/14-336.
# Further arguments are passed on and override: bash scripts/train_clipself_lvis_image_patches_eva_vitl14.sh --batch-size 4 --name mine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_vitl14
recipe_args
run_training --dataset-type grid_distill --name clipself_lvis_image_patches_eva_vitl14 --alpha 0.95 \
    --train-data "$LVIS_TRAIN" --train-image-root "$DATA" \
    "${MODEL_ARGS[@]}" "${RECIPE_ARGS[@]}" "${VAL_ARGS[@]}" "$@"
