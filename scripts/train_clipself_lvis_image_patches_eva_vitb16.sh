#!/usr/bin/env bash
# CLIPSelf with image patches on LVIS, EVA02-CLIP-B/16.
# Further arguments are passed on and override: bash scripts/train_clipself_lvis_image_patches_eva_vitb16.sh --batch-size 4 --name mine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_vitb16
recipe_args
run_training --dataset-type grid_distill --name clipself_lvis_image_patches_eva_vitb16 --alpha 0.7 \
    --train-data "$LVIS_TRAIN" --train-image-root "$DATA" \
    "${MODEL_ARGS[@]}" "${RECIPE_ARGS[@]}" "${VAL_ARGS[@]}" "$@"
