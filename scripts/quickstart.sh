#!/usr/bin/env bash
# CLIPSelf from nothing: installs, draws a small panoptic dataset, trains a tiny CLIP on image-text pairs, distils it into a
# dense CLIP on image patches, and shows what that did. At most 15 minutes on 2 CPU cores; needs Python 3.10 or newer.
#
#   bash scripts/quickstart.sh            results in quickstart/: report.png and the two experiments under logs/
#   bash scripts/quickstart.sh --smoke    the same with a handful of images and steps, to see that everything runs
#   OUT=DIR                               another folder
#   CLIPSELF_VENV=DIR, PYTHON=FILE        another environment than .venv; the interpreter to make it from: see _venv.sh
#
# Running it again uses the generated data again when it is complete, and trains anew: its own scenes (OUT/data) and runs
# (OUT/logs/start, OUT/logs/clipself) are deleted then, and what it did not make is refused. A relative OUT is meant from the
# folder that the command is given in; the default, quickstart, is in the clone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_study.sh"
take_smoke "${1:-}"
OUT="${OUT:-quickstart${smoke:+/smoke}}"
data="$OUT/data" logs="$OUT/logs"
check_scenes "$data"
take_folder "$OUT" logs/start logs/clipself

# Sizes. One step of the first training takes about 0.7 s on 2 cores, one of the second about 0.45 s.
train=2000 val=150 pairs=3000
teacher_steps=480 teacher_batch=64
student_steps=320 student_batch=8
if [ -n "$smoke" ]; then train=32 val=8 pairs=16 teacher_steps=4 teacher_batch=16 student_steps=4 student_batch=4; fi

times=()
stage_begin=$SECONDS
stage() {  # stage NAME: ends the one before
    local now=$SECONDS
    if [ -n "${stage_name:-}" ]; then times+=("$stage_name=$((now - stage_begin))"); fi
    stage_name="$1" stage_begin=$now
    if [ -n "$1" ]; then printf '\n== %s (%s since the start)\n' "$1" "$(elapsed "$now")"; fi
}

stage "install"
source scripts/_venv.sh
ensure_venv
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
# The model is tiny: more threads than a few only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}"
# Threads that wait sleep instead of spinning: as fast on an idle machine, and twice as fast beside anything else.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

stage "generate data"
scene_args=(--train "$train" --val "$val" --pairs "$pairs" --size 128 --pair-size 64 --things 16 --stuff 6 --pattern-names
    --min-object 0.28 --max-object 0.5 --max-objects 4 --seed 0)
if has_scenes "$data" "${scene_args[@]}"; then echo "Using the data in $data"; fi
make_scenes "$data" "${scene_args[@]}"
rm -rf -- "$logs/start" "$logs/clipself"

evaluation=(--val-data "$data/annotations/panoptic_val2017.json" --val-image-root "$data/val2017"
    --det-image-size 128 --eval-image-sizes 128)
machine=(--device cpu --precision fp32 --workers 1 --log-every-n-steps 20 --logs "$logs" --seed 0)

stage "train a tiny CLIP"
"$PY" -m training.main --model ViT-Ti-8-64 --dataset-type contrastive --name start \
    --train-data "$data/annotations/captions_pairs.json" --train-image-root "$data/pairs" \
    --batch-size "$teacher_batch" --epochs 100 --max-steps "$teacher_steps" --lr 1e-3 --wd 0.1 --warmup 50 \
    --save-frequency 0 "${machine[@]}"

stage "distil with CLIPSelf"
"$PY" -m training.main --model ViT-Ti-8-64 --pretrained "$logs/start/checkpoints/clipself.pt" \
    --dataset-type grid_distill --name clipself --lock-image --lock-image-unlocked-groups 8 \
    --train-data "$data/annotations/instances_train2017.json" --train-image-root "$data/train2017" \
    --batch-size "$student_batch" --epochs 100 --max-steps "$student_steps" --lr 1e-3 --wd 0.1 --warmup 50 \
    --max-split 4 --max-boxes 12 --alpha 1.0 --save-frequency 0 --zeroshot-frequency 0 \
    "${evaluation[@]}" "${machine[@]}"

stage "report"
"$PY" tools/quickstart_report.py --start "$logs/start" --distilled "$logs/clipself" --model ViT-Ti-8-64 --size 128 \
    --data "$data" --output "$OUT/report.png"
stage ""

echo
for t in "${times[@]}"; do printf '%-22s %4d s\n' "${t%=*}" "${t##*=}"; done
printf '%-22s %4d s\n' "in all" $((SECONDS - begin))
echo "Picture: $OUT/report.png    Model: $logs/clipself/checkpoints/clipself.pt"
