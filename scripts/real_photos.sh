#!/usr/bin/env bash
# Photographs in, pictures of dense maps before and after a short distillation on these very photographs out.
#
#   bash scripts/real_photos.sh DIR [CLASS ...]       classes: cat dog "traffic light"; without, components only
#   MODEL, PRETRAINED   the model and its weights (default EVA02-CLIP-B-16 with checkpoints/EVA02_CLIP_B_psz16_s8B.pt);
#                       PRETRAINED is a file or a tag, "" for random weights
#   STEPS, SIZE         optimizer steps (default 300), side of the dense input in pixels (default: 32 patches, 512 for B/16)
#   OUT                 folder of the results (default logs/real_photos); SHOW, photographs that are drawn (default 12)
#   DEVICE              cuda or cpu (default: a GPU where there is one);  PYTHON, CLIPSELF_VENV as for the recipes
# Relative paths are meant from the folder that the command is given in.
#
# Fewer than a hundred photographs teach little that holds for others; these ones are shown as the model learns them.
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: bash scripts/real_photos.sh DIR [CLASS ...]" >&2
    exit 2
fi
photos="$(realpath -m "$1")"
shift
if [ ! -d "$photos" ]; then echo "error: $photos is no folder: give one with photographs" >&2; exit 2; fi
number="${SHOW:-12}"
case "$number" in "" | *[!0-9]* | 0) echo "error: SHOW is \"$number\": give the number of photographs to draw, 1 or more" >&2; exit 2 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

MODEL="${MODEL:-EVA02-CLIP-B-16}"
PRETRAINED="${PRETRAINED-$CHECKPOINTS/EVA02_CLIP_B_psz16_s8B.pt}"
OUT="${OUT:-${CLONE}logs/real_photos}"
steps="${STEPS:-300}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
if [ -e "$OUT/distilled" ]; then
    echo "error: $OUT/distilled exists: name another folder with OUT, or delete it" >&2
    exit 2
fi
model=(--model "$MODEL")
place=()
if [ -n "${DEVICE:-}" ]; then place=(--device "$DEVICE"); fi
# Patch size and number of blocks are the model's; photographs are listed as the training lists them, and the first ones drawn.
mapfile -t -d "" told < <("$PYTHON" - "$MODEL" "$photos" "$number" <<'PROGRAM'
import logging
import os
import sys
from pathlib import Path

import open_clip
from training.engine.data.folder import list_images
from training.engine.errors import as_user_error, run_program
from training.models import model_name


def main() -> None:
    model, photos, number = sys.argv[1:]
    logging.disable(logging.WARNING)  # that this one has random weights is as it should be
    with as_user_error():
        visual = open_clip.create_model(model_name(model), pretrained=None, device="meta").visual
    _, names, folder = list_images(Path(photos), "", "DIR")
    told = [str(visual.patch_size), str(len(visual.trunk.blocks))]
    told += [os.path.join(folder, name) for name in names[: int(number)]]
    sys.stdout.buffer.write(b"".join(os.fsencode(text) + b"\0" for text in told))


sys.exit(run_program(main))
PROGRAM
)
if [ ${#told[@]} -lt 3 ]; then exit 2; fi  # the program has said why
patch="${told[0]}" blocks="${told[1]}" shown=("${told[@]:2}")
size="${SIZE:-$((32 * patch))}"

echo "== distil on $photos: $steps steps at $size pixels"
"$PYTHON" -m training.main "${model[@]}" --pretrained "$PRETRAINED" --train-data "$photos" --dataset-type grid_distill \
    --det-image-size "$size" --batch-size 2 --epochs 100000 --max-steps "$steps" --lr 1e-5 --wd 0.1 \
    --warmup $((steps / 10)) --lock-image --lock-image-unlocked-groups "$blocks" --alpha 0.7 --workers 2 \
    --log-every-n-steps 50 --save-frequency 0 --logs "$OUT" --name distilled "${place[@]+"${place[@]}"}"

echo "== draw"
classes=()
if [ $# -gt 0 ]; then classes=(--classes "$@"); fi
"$PYTHON" "${CLONE}tools/show.py" "${shown[@]}" "${model[@]}" --pretrained "$PRETRAINED" "$OUT/distilled/checkpoints/clipself.pt" \
    --short-side "$size" --out "$OUT/pictures" "${classes[@]+"${classes[@]}"}" "${place[@]+"${place[@]}"}"
echo
echo "Pictures: $OUT/pictures (a row before, a row after)    Model: $OUT/distilled/checkpoints/clipself.pt"
