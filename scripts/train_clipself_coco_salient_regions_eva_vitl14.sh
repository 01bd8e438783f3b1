#!/usr/bin/env bash
# CLIPSelf on patches and on what a foundation model sees stand out, without annotations: COCO, EVA02-CLIP-L/14-336.
#
# The regions are found first, once: 118 thousand images, shared among the processes. That needs scikit-learn (pip install
# -e ".[proposals]", in the clone) and DINOv2's weights, which timm fetches from the hub once; VFM names another timm trunk.
# --dry-run wants the file of the regions to be there.
# With one GPU that has the room, --batch-size 16 is what 8 GPUs of batch 2 are.
# Further arguments are passed on and override: bash scripts/train_clipself_coco_salient_regions_eva_vitl14.sh --batch-size 16 --name mine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_vitl14
recipe_args
train_on_salient_regions --dataset-type mixed_distill --max-size 10000 --name clipself_coco_salient_regions_eva_vitl14 --alpha 0.95 \
    --train-data "$REGIONS" --train-image-root "$DATA/train2017" \
    "${MODEL_ARGS[@]}" "${RECIPE_ARGS[@]}" "${VAL_ARGS[@]}" "$@"
